"""Text Embeddings Inference's shapes, with ``model`` added to the body. Pure: bytes to requests, answers to bytes.

``/embed`` ``{inputs, normalize?, dimensions?}`` -> vectors; ``/predict`` ``{inputs, raw_scores?}`` -> scores by label;
``/rerank`` ``{query, texts, raw_scores?, return_text?}`` -> texts by score; ``/similarity``
``{inputs: {source_sentence, sentences}}`` -> cosines; ``/embed_sparse`` ``{inputs}`` -> weights by index;
``/embed_all`` ``{inputs}`` -> a vector a token. Embeddings come from embedding deltas (``base`` where none is named),
which give every token's last hidden row to ``/embed_all``, as multi-vector gives its vectors; predictions from
classifications, ranks from regressions on pairs, or from how alike query and text are. Texts longer than the delta
reads are refused unless ``truncate`` is true, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve import __version__
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import BASE, Prediction, Request
from bertology_serve.errors import DataError, LimitError, Unsupported
from bertology_serve.files import JsonMapping, JsonObject
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.protocol.hf import Options, classification, cosine, sparse
from bertology_serve.serving.protocol.json_codec import (
    check_items,
    check_size,
    encode,
    encode_list,
    flag,
    object_of,
    shown,
)
from bertology_serve.serving.protocol.openai import score_of
from bertology_serve.tasks.embedding import prompts_for
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import CLASSIFICATION, EMBEDDING, MULTI_VECTOR, REGRESSION, SPARSE, VECTOR_KINDS
from bertology_serve.tasks.vectors import PROMPT_FIELDS, VECTOR_FIELDS

Find = Callable[[str], Delta]
Body = JsonMapping
Tokenizer = Any
EMBED, PREDICT, RERANK, SIMILARITY = "embed", "predict", "rerank", "similarity"
EMBED_SPARSE, EMBED_ALL = "embed_sparse", "embed_all"
TASKS: dict[str, tuple[str, ...]] = {
    EMBED: (EMBEDDING,), SIMILARITY: (EMBEDDING,), EMBED_ALL: (EMBEDDING, MULTI_VECTOR), EMBED_SPARSE: (SPARSE,),
    PREDICT: (CLASSIFICATION,), RERANK: (REGRESSION, *VECTOR_KINDS),
}  # fmt: skip
"""What each route takes; ``base`` answers those that begin with embeddings."""


@dataclass(frozen=True)
class TeiCall:
    """One body: ``what`` is its route, ``texts`` are those to rank, ``flat`` says that one text was classified.

    With ``truncate`` false no text may be longer than the delta reads.
    """

    what: str
    delta: Delta
    requests: list[Request]
    truncate: bool
    raw: bool = False
    flat: bool = False
    texts: tuple[str, ...] = ()
    with_text: bool = False


def read_tei(body: bytes, what: str, find: Find, named: str | None = None, most: float = math.inf) -> TeiCall:
    """A call of one of TEI's routes; ``named`` is the delta that the path names, before ``model`` of the body.

    Raises DataError, NotFound, Unsupported for what would not be honoured, and LimitError for more than ``most`` items.
    """
    value = object_of(body)
    delta = _delta(value, what, find, named)
    check_items(_count(value), most)
    records, names, more = _RECORDS[what](value)
    rows, fields = what == EMBED_ALL and delta.task.kind == EMBEDDING, _fields(value, what)
    requests = [
        Request(delta.name, record | fields, "", flag(value, "raw_scores"), where, rows=rows)
        for record, where in zip(records, names, strict=True)
    ]
    _refuse(value, what)
    return TeiCall(what, delta, requests, flag(value, "truncate"), flag(value, "raw_scores"), **more)


def write_tei(call: TeiCall, predictions: Sequence[Prediction]) -> bytes:
    """The answers as TEI gives them."""
    if call.what == RERANK:
        return encode(_ranks(call, predictions))
    if call.what == PREDICT:
        options = Options(transform="none" if call.raw else "")
        found = [classification(prediction, options) for prediction in predictions]
        return encode(found[0]) if call.flat else encode_list(found)
    if call.what == EMBED_ALL:
        return encode_list(prediction.answer["vectors"] for prediction in predictions)
    if call.what == EMBED_SPARSE:
        return encode_list(sparse(prediction, Options()) for prediction in predictions)
    vectors = [prediction.answer["embedding"] for prediction in predictions]
    return encode_list(vectors if call.what == EMBED else [cosine(vectors[0], other) for other in vectors[1:]])


def _ranks(call: TeiCall, predictions: Sequence[Prediction]) -> list[JsonObject]:
    """The texts, best first; a regression's value is squeezed into 0..1 unless raw scores are asked for."""
    scores = [score_of(prediction, call.raw) for prediction in predictions]
    ranks: list[JsonObject] = [{"index": index, "score": score} for index, score in enumerate(scores)]
    if call.with_text:
        ranks = [rank | {"text": text} for rank, text in zip(ranks, call.texts, strict=True)]
    return sorted(ranks, key=lambda rank: -float(rank["score"]))


def _count(value: Body) -> int:
    """The items of a body, the text that others are compared with included; 1 where there is no list."""
    inputs = value.get("texts", value.get("inputs"))
    if isinstance(inputs, dict):
        sentences = inputs.get("sentences")
        return 1 + len(sentences) if isinstance(sentences, list) else 1
    return len(inputs) if isinstance(inputs, list) else 1


def _delta(value: Body, what: str, find: Find, named: str | None) -> Delta:
    name = named or value.get("model") or (BASE if TASKS[what][0] == EMBEDDING else None)
    if not isinstance(name, str):
        raise DataError(f"field 'model' is {shown(value.get('model'))}; expected the name of a delta")
    delta = find(name)
    if delta.task.kind not in TASKS[what]:
        raise Unsupported(f"/{what} is for {' or '.join(TASKS[what])}; delta {delta.name!r} does {delta.task.kind}")
    return delta


def _refuse(value: Body, what: str) -> None:
    for name in ("prompt_name", "dimensions", "encoding_format"):
        if value.get(name) is not None and name not in _FIELDS.get(what, ()):
            raise Unsupported(f"option {name!r} is not supported by /{what}; leave it out")
    if str(value.get("truncation_direction") or "right").lower() != "right":
        raise Unsupported("option 'truncation_direction' is not supported with this value; texts are cut on the right")


# What of a body goes into its records: vectors of texts are normalised unless a call says otherwise
_FIELDS: Mapping[str, tuple[str, ...]] = {
    EMBED: (*PROMPT_FIELDS, *VECTOR_FIELDS),
    SIMILARITY: (*PROMPT_FIELDS, "dimensions", "normalize"),
    EMBED_ALL: PROMPT_FIELDS,
    EMBED_SPARSE: PROMPT_FIELDS,
}


def _fields(value: Body, what: str) -> JsonObject:
    known: JsonObject = {"normalize": True} if "normalize" in _FIELDS.get(what, ()) else {}
    return known | {name: value[name] for name in _FIELDS.get(what, ()) if value.get(name) is not None}


Records = tuple[list[JsonObject], list[str], JsonObject]


def _embed(value: Body) -> Records:
    inputs = value.get("inputs")
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list) or not texts:
        raise DataError(f"field 'inputs' is {shown(inputs)}; expected a text or a list of texts")
    if any(isinstance(text, int | list) and not isinstance(text, bool) for text in texts):
        raise Unsupported("field 'inputs' holds token ids, which belong to another tokenizer; send texts")
    return [{"text": text} for text in texts], _places("inputs", texts), {}


def _predict(value: Body) -> Records:
    """One text, ``[text]``, a pair ``[text, pair]``, or a list of those lists."""
    inputs = value.get("inputs")
    if isinstance(inputs, str):
        return [{"text": inputs}], ["inputs"], {"flat": True}
    if not isinstance(inputs, list) or not inputs:
        raise DataError(f"field 'inputs' is {shown(inputs)}; expected a text, a pair, or a list of those")
    if not isinstance(inputs[0], list):
        return [_pair(inputs, "inputs")], ["inputs"], {"flat": True}
    places = _places("inputs", inputs)
    return [_pair(item, place) for item, place in zip(inputs, places, strict=True)], places, {}


def _pair(item: Any, where: str) -> JsonObject:
    if not isinstance(item, list) or len(item) not in (1, 2):
        raise DataError(f"{where} is {shown(item)}; expected [text] or [text, pair]")
    return dict(zip(("text", "text_pair"), item, strict=False))


def _rerank(value: Body) -> Records:
    texts = value.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"field 'texts' is {shown(texts)}; expected a list of texts and nothing else")
    records = [{"text": value.get("query"), "text_pair": text} for text in texts]
    return records, _places("texts", texts), {"texts": tuple(texts), "with_text": flag(value, "return_text")}


def _similarity(value: Body) -> Records:
    inputs = value.get("inputs")
    sentences = inputs.get("sentences") if isinstance(inputs, dict) else None
    if not isinstance(inputs, dict) or not isinstance(sentences, list) or not sentences:
        raise DataError("field 'inputs' holds no sentences; expected {source_sentence, sentences}")
    texts = [inputs.get("source_sentence"), *sentences]
    return [{"text": text} for text in texts], ["source_sentence", *_places("sentences", sentences)], {}


_RECORDS: dict[str, Callable[[Body], Records]] = {
    EMBED: _embed, EMBED_ALL: _embed, EMBED_SPARSE: _embed, PREDICT: _predict, RERANK: _rerank,
    SIMILARITY: _similarity,
}  # fmt: skip


def _places(name: str, items: Sequence[Any]) -> list[str]:
    return [f"{name}[{index}]" for index in range(len(items))]


ENDLESS = 1 << 40
HIGHEST_ID = 1 << 31


def check_fit(call: TeiCall, tokenizer: Any, most_characters: int) -> None:
    """LimitError for a text longer than the delta reads, where the call does not let it be cut; before it is
    tokenised, for one of more characters than are taken at all.
    """
    most = call.delta.task.max_length
    for request in call.requests:
        check_size(request, most_characters)
    for request in [] if call.truncate or call.delta.task.long == "windows" else call.requests:
        text, pair = request.record.get("text"), request.record.get("text_pair")
        if call.delta.task.prompts and isinstance(text, str):
            text = prompts_for(call.delta.task, request.record, request.where)[0] + text
        sizes = [len(part.encode("utf-8", "replace")) for part in (text, pair) if isinstance(part, str)]
        if sum(sizes) <= most - 4 or not isinstance(text, str):
            continue
        length = len(encode_text(tokenizer, text, pair if isinstance(pair, str) else None, ENDLESS).ids)
        if length > most:
            raise LimitError(f"{request.where}: {length} tokens; at most {most} are read, or send 'truncate': true")


def tokenize(value: Body, tokenizer: Any, config: ServerConfig) -> bytes:
    """``{inputs, add_special_tokens?}`` -> for each text its tokens ``{id, text, special, start, stop}``.

    As many texts, as long ones and as many tokens are taken as of calls that the encoder answers; LimitError beyond.
    """
    if value.get("prompt_name") is not None:
        raise Unsupported("option 'prompt_name' is not supported: send the text with its prompt")
    texts = [value["inputs"]] if isinstance(value.get("inputs"), str) else value.get("inputs")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"field 'inputs' is {shown(value.get('inputs'))}; expected a text or a list of texts")
    check_items(len(texts), config.limits.max_items)
    special = value.get("add_special_tokens") is not False
    rows, left = list[bytes](), config.batching.max_queue_tokens
    for index, text in enumerate(texts):
        check_size(Request("", {"text": text}, where=f"inputs[{index}]"), config.limits.max_text_characters)
        tokens = _tokens(text, tokenizer, special)
        left -= len(tokens)
        if left < 0:
            raise _too_many(config)
        rows.append(encode_list(tokens))
    return b"[" + b",".join(rows) + b"]"


def ids(value: Body, tokenizer: Any, config: ServerConfig) -> bytes:
    """``{ids, skip_special_tokens?}`` -> for each list of ids its text; LimitError as for ``tokenize``."""
    found = value.get("ids")
    rows = [found] if isinstance(found, list) and found and not isinstance(found[0], list) else found
    if not isinstance(rows, list) or not all(isinstance(row, list) and _are_ids(row) for row in rows):
        raise DataError(f"field 'ids' is {shown(found)}; expected a list of token ids, or a list of those")
    check_items(len(rows), config.limits.max_items)
    if sum(map(len, rows)) > config.batching.max_queue_tokens:
        raise _too_many(config)
    skip = value.get("skip_special_tokens") is not False
    return encode_list(tokenizer.backend_tokenizer.decode(row, skip_special_tokens=skip) for row in rows)


def info(delta: Delta, config: ServerConfig, dtype: str) -> JsonObject:
    """What TEI tells of its model, of a delta."""
    task = delta.task
    labels = task.labels or ("value",)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    kinds: JsonMapping = {
        EMBEDDING: {"embedding": {"pooling": task.pooling}},
        SPARSE: {"embedding": {"pooling": "splade"}},
        MULTI_VECTOR: {"embedding": {"pooling": task.pooling}},
        CLASSIFICATION: {"classifier": names},
        REGRESSION: {"reranker": names},
    }
    if task.kind not in kinds:
        raise Unsupported(f"Text Embeddings Inference knows no {task.kind}; GET /models/{delta.name} tells of it")
    return {
        "model_id": delta.name,
        "model_sha": delta.version,
        "model_dtype": dtype,
        "model_type": kinds[task.kind],
        "max_concurrent_requests": config.limits.max_items,
        "max_input_length": task.max_length,
        "max_batch_tokens": config.batching.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": config.limits.max_items,
        "auto_truncate": False,
        "tokenization_workers": 2,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _tokens(text: str, tokenizer: Any, special: bool) -> list[JsonObject]:
    encoding = encode_text(tokenizer, text, None, ENDLESS, offsets=True)
    names = tokenizer.convert_ids_to_tokens(list(encoding.ids))
    rows: Iterable[tuple[int, str, tuple[int, int], int]] = zip(
        encoding.ids, names, encoding.offsets, encoding.parts, strict=True
    )
    return [
        {"id": token, "text": name if part < 0 else text[start:stop], "special": part < 0}
        | ({"start": None, "stop": None} if part < 0 else {"start": start, "stop": stop})
        for token, name, (start, stop), part in rows
        if special or part >= 0
    ]


def _are_ids(row: Sequence[Any]) -> bool:
    return all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < HIGHEST_ID for token in row)


def _too_many(config: ServerConfig) -> LimitError:
    return LimitError(f"the call holds more than {config.batching.max_queue_tokens} tokens; send several")
