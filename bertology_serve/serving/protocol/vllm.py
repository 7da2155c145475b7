"""vLLM's ``/score`` and ``/classify``. Pure.

``/score`` ``{model, text_1, text_2}`` -> a score a pair, one text beside many or as many beside as many, by a
regression on pairs or by embeddings; ``/classify`` ``{model, input}`` -> label and probabilities, by a classification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError, Unsupported
from bertology_serve.serving.protocol.json_codec import encode, object_of, shown
from bertology_serve.serving.protocol.openai import Receipt, model_of, texts_of
from bertology_serve.serving.protocol.rerank import pairs, score_of
from bertology_serve.tasks.spec import CLASSIFICATION, EMBEDDING, REGRESSION

# Names of the two sides, older and newer
SIDES = (("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2"))


@dataclass(frozen=True)
class PoolingCall:
    """One request a score or a text; ``raw``: as the head gives it, without sigmoid or softmax."""

    delta: Delta
    requests: list[Request]
    raw: bool


def read_score(body: bytes, find: Callable[[str], Delta], most: float) -> PoolingCall:
    """A call of ``POST /score``. Raises DataError, NotFound, Unsupported, LimitError for more than ``most`` pairs."""
    value = object_of(body)
    delta, raw = model_of(value, find, REGRESSION, EMBEDDING), _raw(value)
    ones, others = (_side(value, names, most) for names in SIDES)
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise DataError(f"there are {len(ones)} texts beside {len(others)}; expected one, or as many")
    return PoolingCall(delta, pairs(delta, ones, others, [f"pair {index}" for index in range(len(ones))]), raw)


def write_score(call: PoolingCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """A score for each pair, in their order."""
    return _listed(call, receipt, [{"object": "score", "score": score_of(one, call.raw)} for one in predictions])


def read_classify(body: bytes, find: Callable[[str], Delta], most: float) -> PoolingCall:
    """A call of ``POST /classify``. Raises as ``read_score``."""
    value = object_of(body)
    delta, raw = model_of(value, find, CLASSIFICATION), _raw(value)
    requests = [
        Request(delta.name, {"text": text}, logits=raw, where=f"input[{index}]", version=delta.version)
        for index, text in enumerate(texts_of(value.get("input"), "input", most))
    ]
    return PoolingCall(delta, requests, raw)


def write_classify(call: PoolingCall, predictions: Sequence[Prediction], receipt: Receipt) -> bytes:
    """Label and probabilities for each text, in their order."""
    rows = []
    for prediction in predictions:
        answer = prediction.answer
        numbers = list(answer["logits"] if call.raw else answer["scores"].values())
        rows.append({"label": answer["label"], "probs": numbers, "num_classes": len(numbers)})
    return _listed(call, receipt, rows)


def _listed(call: PoolingCall, receipt: Receipt, rows: Sequence[dict[str, Any]]) -> bytes:
    data = [{"index": index, **row} for index, row in enumerate(rows)]
    told = {"id": receipt.id, "object": "list", "created": receipt.created, "model": call.delta.name}
    return encode({**told, "data": data, "usage": receipt.usage})


def _side(value: dict[str, Any], names: Sequence[str], most: float) -> list[str]:
    given = [name for name in names if value.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"fields {' and '.join(map(repr, given))} say the same; send one of them")
    name = given[0] if given else names[0]
    return texts_of(value.get(name), name, most)


def _raw(value: dict[str, Any]) -> bool:
    if value.get("truncate_prompt_tokens") not in (None, -1):
        raise Unsupported(
            "option 'truncate_prompt_tokens' is not supported: texts are cut where the delta ends; leave it out"
        )
    wanted = value.get("use_activation")
    if wanted is not None and not isinstance(wanted, bool):
        raise DataError(f"field 'use_activation' is {shown(wanted)}; expected true or false")
    return wanted is False
