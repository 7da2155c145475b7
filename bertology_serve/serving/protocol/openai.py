"""The shapes whose body names the model: OpenAI's, Cohere's and Jina's, vLLM's. Pure: bytes in, bytes out.

OpenAI: ``/v1/models`` and ``/v1/embeddings``, as its own client sends and parses them. A model is a delta; ``parent``
names the encoder that it shares. Vectors go out as numbers, or, as that client asks unless told otherwise, as base64 of
little-endian float32.

Cohere: ``/v2/embed`` ``{model, texts, input_type, embedding_types, output_dimension}`` -> vectors by type.

Cohere and Jina: ``{model, query, documents}`` -> documents by relevance. The model is a regression on pairs, whose
value is squeezed into 0..1, or an embedding of any kind: cosine, product of weights or MaxSim.

vLLM: ``/score`` ``{model, text_1, text_2}`` -> a score a pair, one text beside many or as many beside as many, by a
regression on pairs or by embeddings; ``/classify`` ``{model, input}`` -> label and probabilities, by a classification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.serving.protocol.hf import sigmoid
from bertology_serve.serving.protocol.json_codec import check_items, encode, encode_list, flag, object_of, shown
from bertology_serve.tasks.spec import CLASSIFICATION, EMBEDDING, REGRESSION, VECTOR_KINDS
from bertology_serve.tasks.vectors import FLOAT, PROMPT_FIELDS

OWNER = "bertology-serve"


@dataclass(frozen=True)
class Receipt:
    """What an answer tells of its call: its id, when it was answered (seconds of 1970), the tokens that it cost."""

    id: str
    created: int
    tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


@dataclass(frozen=True)
class ModelCall:
    """One request a text, or a pair. ``raw``: as the head gives it, without sigmoid or softmax; of ranked documents the
    best ``top_n`` are given (``None``: all), ``with_text`` with their texts.
    """

    delta: Delta
    requests: list[Request]
    raw: bool = False
    top_n: int | None = None
    with_text: bool = False


def read_embeddings(body: bytes, find: Callable[[str], Delta], most: float = math.inf) -> ModelCall:
    """A call of ``POST /v1/embeddings``. Raises DataError, NotFound, Unsupported for token ids and other tasks, and
    LimitError for more than ``most`` texts.
    """
    value = object_of(body)
    delta = model_of(value, find, EMBEDDING)
    asked = (*PROMPT_FIELDS, "encoding_format", "dimensions")
    fields = {name: value[name] for name in asked if value.get(name) is not None}
    return ModelCall(delta, _requests(delta, value, "input", fields, most))


def _requests(
    delta: Delta, value: JsonObject, field: str, fields: JsonObject, most: float, logits: bool = False
) -> list[Request]:
    return [
        Request(delta.name, {"text": text, **fields}, logits=logits, where=f"{field}[{index}]")
        for index, text in enumerate(texts_of(value.get(field), field, most))
    ]


def write_embeddings(call: ModelCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """The vectors in the order of the texts."""
    data = []
    for index, prediction in enumerate(predictions):
        data.append({"object": "embedding", "index": index, "embedding": prediction.answer["embedding"]})
    rest = encode({"model": call.delta.name, "usage": receipt.usage})
    return b'{"object":"list","data":' + encode_list(data) + b"," + rest[1:]


def read_embed(body: bytes, find: Callable[[str], Delta], most: float = math.inf) -> ModelCall:
    """A call of Cohere's ``POST /v2/embed``. Raises as ``read_embeddings``; Unsupported for images."""
    value = object_of(body)
    for name in ("images", "inputs"):
        if value.get(name) is not None:
            raise Unsupported(f"field {name!r} is not supported: deltas read texts; send 'texts'")
    if str(value.get("truncate") or "END").upper() != "END":
        raise Unsupported("option 'truncate' is not supported with this value; texts are cut at their end")
    delta = model_of(value, find, EMBEDDING)
    fields = {
        "embedding_types": value.get("embedding_types") or [FLOAT],
        "input_type": value.get("input_type"),
        "dimensions": value.get("output_dimension"),
    }
    return ModelCall(delta, _requests(delta, value, "texts", fields, most))


def write_embed(call: ModelCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """The vectors by type, each in the order of the texts."""
    rows = [prediction.answer["embeddings"] for prediction in predictions]
    told = {
        "id": receipt.id,
        "texts": [request.record["text"] for request in call.requests],
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": receipt.tokens}},
        "response_type": "embeddings_by_type",
    }
    vectors = b",".join(encode(name) + b":" + encode_list(row[name] for row in rows) for name in rows[0])
    return encode(told)[:-1] + b',"embeddings":{' + vectors + b"}}"


def describe(delta: Delta, started: int, ready: bool) -> JsonObject:
    """A delta as a model; ``started`` stands for the date of making, which a delta does not know.

    ``name`` and ``ready`` are what the first protocol of KServe asks the same route for.
    """
    return {"id": delta.name, "object": "model", "created": started, "owned_by": OWNER, "root": delta.name,
            "parent": None if delta.name == "base" else "base", "name": delta.name, "ready": ready}  # fmt: skip


def model_of(value: JsonObject, find: Callable[[str], Delta], *tasks: str) -> Delta:
    """The delta that ``model`` names. DataError, NotFound; Unsupported where it does none of those tasks."""
    name = value.get("model")
    if not isinstance(name, str) or not name:
        raise DataError(f"field 'model' is {shown(name)}; expected the name of a delta")
    delta = find(name)
    if delta.task.kind not in tasks:
        raise Unsupported(
            f"delta {delta.name!r} does {delta.task.kind}, not {' or '.join(tasks)}; POST /models/{delta.name}"
        )
    return delta


def texts_of(value: Any, field: str, most: float) -> list[str]:
    """A text, or a list of at most so many, as a list; DataError, LimitError, and Unsupported for token ids."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise DataError(f"field {field!r} is {shown(value)}; expected a text or a list of texts")
    check_items(len(texts), most)
    for text in texts:
        if isinstance(text, int | list) and not isinstance(text, bool):
            raise Unsupported(f"field {field!r} holds token ids, which belong to another tokenizer; send texts")
        if not isinstance(text, str):
            raise DataError(f"field {field!r} holds {shown(text)}; expected texts")
    return texts


def read_rerank(body: bytes, find: Callable[[str], Delta], most: float) -> ModelCall:
    """A call of ``POST /v1/rerank`` or ``/v2/rerank``. DataError, NotFound; Unsupported for what is not done,
    LimitError for more than ``most`` documents.
    """
    value = object_of(body)
    delta = model_of(value, find, REGRESSION, *VECTOR_KINDS)
    query, documents = value.get("query"), value.get("documents")
    if not isinstance(query, str):
        raise DataError(f"field 'query' is {shown(query)}; expected a text")
    if not isinstance(documents, list):
        raise DataError(f"field 'documents' is {shown(documents)}; expected a list of texts")
    texts = texts_of([one.get("text") if isinstance(one, dict) else one for one in documents], "documents", most)
    _refuse(value, delta)
    top_n = value.get("top_n")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 0):
        raise DataError(f"field 'top_n' is {shown(top_n)}; expected a whole number from 1")
    places = [f"documents[{index}]" for index in range(len(texts))]
    requests = pairs(delta, [query] * len(texts), texts, places)
    return ModelCall(delta, requests, top_n=top_n or None, with_text=flag(value, "return_documents"))


def write_rerank(call: ModelCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """The documents, best first."""
    results: list[JsonObject] = []
    for index, (request, prediction) in enumerate(zip(call.requests, predictions, strict=True)):
        result = {"index": index, "relevance_score": score_of(prediction)}
        results.append(result | {"document": {"text": request.record["text_pair"]}} if call.with_text else result)
    results.sort(key=lambda result: -float(result["relevance_score"]))
    return encode(
        {"id": receipt.id, "model": call.delta.name, "results": results[: call.top_n], "usage": receipt.usage}
    )


def pairs(delta: Delta, ones: Sequence[Any], others: Sequence[Any], places: Sequence[str]) -> list[Request]:
    """A request for each pair of texts; ``places`` name them in messages."""
    return [
        Request(delta.name, {"text": one, "text_pair": other}, where=place)
        for one, other, place in zip(ones, others, places, strict=True)
    ]


def score_of(prediction: Prediction, raw: bool = False) -> float:
    """How well a pair fits: how alike two embeddings are, or a regression's value, in 0..1 unless ``raw``."""
    if "similarity" in prediction.answer:
        return float(prediction.answer["similarity"])
    value = float(prediction.answer["value"])
    return value if raw else sigmoid(value)


def _refuse(value: JsonObject, delta: Delta) -> None:
    """What Cohere would do and this server does not: long texts are cut, and of documents only ``text`` is read."""
    if value.get("rank_fields") not in (None, ["text"]):
        raise Unsupported("option 'rank_fields' is not supported: documents are ranked by 'text'; leave it out")
    if value.get("max_chunks_per_doc") is not None:
        raise Unsupported("option 'max_chunks_per_doc' is not supported: documents are cut, not chunked; leave it out")
    most = value.get("max_tokens_per_doc")
    longest = delta.task.max_length if delta.task.long == "cut" else math.inf
    if most is not None and (not isinstance(most, int) or most < longest):
        raise Unsupported(
            f"option 'max_tokens_per_doc' is not supported below {longest}, where pairs are cut anyway; leave it out"
        )


# Names of the two sides, older and newer
SIDES = (("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2"))


def read_score(body: bytes, find: Callable[[str], Delta], most: float) -> ModelCall:
    """A call of ``POST /score``. Raises DataError, NotFound, Unsupported, LimitError for more than ``most`` pairs."""
    value = object_of(body)
    delta, raw = model_of(value, find, REGRESSION, *VECTOR_KINDS), _raw(value)
    ones, others = (_side(value, names, most) for names in SIDES)
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise DataError(f"there are {len(ones)} texts beside {len(others)}; expected one, or as many")
    return ModelCall(delta, pairs(delta, ones, others, [f"pair {index}" for index in range(len(ones))]), raw)


def write_score(call: ModelCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """A score for each pair, in their order."""
    return _listed(call, receipt, [{"object": "score", "score": score_of(one, call.raw)} for one in predictions])


def read_classify(body: bytes, find: Callable[[str], Delta], most: float) -> ModelCall:
    """A call of ``POST /classify``. Raises as ``read_score``."""
    value = object_of(body)
    delta, raw = model_of(value, find, CLASSIFICATION), _raw(value)
    return ModelCall(delta, _requests(delta, value, "input", {}, most, logits=raw), raw)


def write_classify(call: ModelCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """Label and probabilities for each text, in their order."""
    rows = []
    for prediction in predictions:
        answer = prediction.answer
        numbers = list(answer["logits"] if call.raw else answer["scores"].values())
        rows.append({"label": answer["label"], "probs": numbers, "num_classes": len(numbers)})
    return _listed(call, receipt, rows)


def _listed(call: ModelCall, receipt: Receipt, rows: Sequence[JsonObject]) -> bytes:
    data = [{"index": index, **row} for index, row in enumerate(rows)]
    told = {"id": receipt.id, "object": "list", "created": receipt.created, "model": call.delta.name}
    return encode({**told, "data": data, "usage": receipt.usage})


def _side(value: JsonObject, names: Sequence[str], most: float) -> list[str]:
    given = [name for name in names if value.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"fields {' and '.join(map(repr, given))} say the same; send one of them")
    name = given[0] if given else names[0]
    return texts_of(value.get(name), name, most)


def _raw(value: JsonObject) -> bool:
    if value.get("truncate_prompt_tokens") not in (None, -1):
        raise Unsupported(
            "option 'truncate_prompt_tokens' is not supported: texts are cut where the delta ends; leave it out"
        )
    return not flag(value, "use_activation", True)
