"""Ranking in the shape of Cohere and Jina: ``{model, query, documents}`` -> documents by relevance. Pure.

The model is a regression on pairs, whose value is squeezed into 0..1, or an embedding, whose cosine is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError, Unsupported
from bertology_serve.serving.protocol.hf import sigmoid
from bertology_serve.serving.protocol.json_codec import encode, object_of, shown
from bertology_serve.serving.protocol.openai import Receipt, model_of, texts_of
from bertology_serve.tasks.spec import EMBEDDING, REGRESSION


@dataclass(frozen=True)
class RerankCall:
    """One pair a document; the best ``top_n`` are given (``None``: all), with their texts where those are wanted."""

    delta: Delta
    requests: list[Request]
    top_n: int | None
    with_text: bool


def read_rerank(body: bytes, find: Callable[[str], Delta], most: float) -> RerankCall:
    """A call of ``POST /v1/rerank`` or ``/v2/rerank``. DataError, NotFound; Unsupported for what is not done,
    LimitError for more than ``most`` documents.
    """
    value = object_of(body)
    delta = model_of(value, find, REGRESSION, EMBEDDING)
    query, documents = value.get("query"), value.get("documents")
    if not isinstance(query, str):
        raise DataError(f"field 'query' is {shown(query)}; expected a text")
    if not isinstance(documents, list):
        raise DataError(f"field 'documents' is {shown(documents)}; expected a list of texts")
    texts = texts_of([one.get("text") if isinstance(one, dict) else one for one in documents], "documents", most)
    _refuse(value, delta)
    top_n, with_text = value.get("top_n"), value.get("return_documents")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 0):
        raise DataError(f"field 'top_n' is {shown(top_n)}; expected a whole number from 1")
    if with_text is not None and not isinstance(with_text, bool):
        raise DataError(f"field 'return_documents' is {shown(with_text)}; expected true or false")
    places = [f"documents[{index}]" for index in range(len(texts))]
    return RerankCall(delta, pairs(delta, [query] * len(texts), texts, places), top_n or None, bool(with_text))


def write_rerank(call: RerankCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """The documents, best first."""
    results: list[dict[str, Any]] = []
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
        Request(delta.name, {"text": one, "text_pair": other}, where=place, version=delta.version)
        for one, other, place in zip(ones, others, places, strict=True)
    ]


def score_of(prediction: Prediction, raw: bool = False) -> float:
    """How well a pair fits: the cosine of two embeddings, or a regression's value, in 0..1 unless ``raw``."""
    if "similarity" in prediction.answer:
        return float(prediction.answer["similarity"])
    value = float(prediction.answer["value"])
    return value if raw else sigmoid(value)


def _refuse(value: dict[str, Any], delta: Delta) -> None:
    """What Cohere would do and this server does not: long texts are cut, and of documents only ``text`` is read."""
    if value.get("rank_fields") not in (None, ["text"]):
        raise Unsupported("option 'rank_fields' is not supported: documents are ranked by 'text'; leave it out")
    if value.get("max_chunks_per_doc") is not None:
        raise Unsupported("option 'max_chunks_per_doc' is not supported: documents are cut, not chunked; leave it out")
    most = value.get("max_tokens_per_doc")
    if most is not None and (not isinstance(most, int) or most < delta.task.max_length):
        raise Unsupported(
            f"option 'max_tokens_per_doc' is not supported below {delta.task.max_length}, where pairs are cut anyway; "
            "leave it out"
        )
