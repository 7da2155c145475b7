"""TEI's ``/tokenize``, ``/decode`` and ``/info``, and how it bounds texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bertology_serve import __version__
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Request
from bertology_serve.errors import DataError, LimitError, Unsupported
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.protocol.bodies import encode_list, shown
from bertology_serve.serving.protocol.tei import Body, TeiCall
from bertology_serve.serving.sizes import check_items, check_size
from bertology_serve.tasks.encoding import encode_text
from bertology_serve.tasks.spec import CLASSIFICATION, EMBEDDING, REGRESSION

ENDLESS = 1 << 40
HIGHEST_ID = 1 << 31


def check_fit(call: TeiCall, tokenizer: Any, most_characters: int) -> None:
    """LimitError for a text longer than the delta reads, where the call does not let it be cut; before it is
    tokenised, for one of more characters than are taken at all.
    """
    most = call.delta.task.max_length
    for request in call.requests:
        check_size(request, most_characters)
    for request in [] if call.truncate else call.requests:
        text, pair = request.record.get("text"), request.record.get("text_pair")
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
        raise Unsupported("option 'prompt_name' is not supported: a delta brings its own prompt; leave it out")
    texts = [value["inputs"]] if isinstance(value.get("inputs"), str) else value.get("inputs")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"field 'inputs' is {shown(value.get('inputs'))}; expected a text or a list of texts")
    check_items(len(texts), config.max_items)
    special = value.get("add_special_tokens") is not False
    rows, left = list[bytes](), config.max_queue_tokens
    for index, text in enumerate(texts):
        check_size(Request("", {"text": text}, where=f"inputs[{index}]"), config.max_text_characters)
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
    check_items(len(rows), config.max_items)
    if sum(map(len, rows)) > config.max_queue_tokens:
        raise _too_many(config)
    skip = value.get("skip_special_tokens") is not False
    return encode_list(tokenizer.backend_tokenizer.decode(row, skip_special_tokens=skip) for row in rows)


def info(delta: Delta, config: ServerConfig, dtype: str) -> dict[str, Any]:
    """What TEI tells of its model, of a delta."""
    task = delta.task
    labels = task.labels or ("value",)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    kinds: Mapping[str, Any] = {
        EMBEDDING: {"embedding": {"pooling": task.pooling}},
        CLASSIFICATION: {"classifier": names},
        REGRESSION: {"reranker": names},
    }
    if task.kind not in kinds:
        raise Unsupported(
            f"Text Embeddings Inference knows no {task.kind}; GET /models/{delta.name} tells of the delta"
        )
    return {
        "model_id": delta.name,
        "model_sha": delta.version,
        "model_dtype": dtype,
        "model_type": kinds[task.kind],
        "max_concurrent_requests": config.max_items,
        "max_input_length": task.max_length,
        "max_batch_tokens": config.max_batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": config.max_items,
        "auto_truncate": False,
        "tokenization_workers": 2,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _tokens(text: str, tokenizer: Any, special: bool) -> list[dict[str, Any]]:
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
    return LimitError(f"the call holds more than {config.max_queue_tokens} tokens; send several")
