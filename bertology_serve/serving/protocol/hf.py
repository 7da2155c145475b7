"""HuggingFace's task shape: ``{"inputs": ..., "parameters": {...}}`` for one delta. Pure: bytes and structs.

The answers are what ``huggingface_hub.InferenceClient`` parses; tasks that it does not know (multiple choice) are
answered in this project's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError
from bertology_serve.serving.protocol.bodies import decode, encode, encode_list, shown
from bertology_serve.serving.protocol.hf_options import Options, read_options
from bertology_serve.serving.protocol.hf_shapes import SHAPES
from bertology_serve.serving.sizes import check_items
from bertology_serve.tasks.spec import EMBEDDING, QUESTION_ANSWERING


@dataclass(frozen=True)
class TaskCall:
    """The requests of one body. ``single``: ``inputs`` was one item, not a list; ``similarity``: the first request is
    the sentence that the others are compared with.
    """

    delta: Delta
    options: Options
    requests: list[Request]
    single: bool
    similarity: bool = False


def read_task(body: bytes, delta: Delta, most: float = math.inf) -> TaskCall:
    """A call of ``POST /models/{delta}``; raises DataError, Unsupported for options that would not be honoured, and
    LimitError for more than ``most`` items.
    """
    value: Any = decode(body)
    if not isinstance(value, dict):
        raise DataError(f"the body is {shown(value)}; expected an object with 'inputs'")
    if "inputs" not in value:
        raise DataError("field 'inputs' is missing; expected a text, an object with the task's fields, or a list")
    options = read_options(value, delta)
    inputs = value["inputs"]
    if delta.task.kind == EMBEDDING and isinstance(inputs, dict) and "source_sentence" in inputs:
        return _similarity(inputs, delta, options, most)
    items = inputs if isinstance(inputs, list) else [inputs]
    check_items(len(items), most)
    requests = [_request(item, f"inputs[{index}]", delta, options) for index, item in enumerate(items)]
    return TaskCall(delta, options, requests, single=not isinstance(inputs, list))


def write_task(call: TaskCall, predictions: Sequence[Prediction]) -> bytes:
    """The answers in the shape of the delta's task."""
    if call.similarity:
        source, *others = (prediction.answer["embedding"] for prediction in predictions)
        return encode([cosine(source, other) for other in others])
    shape = SHAPES[call.delta.task.kind]
    answers = [shape.answer(prediction, call.options) for prediction in predictions]
    return encode(answers[0]) if call.single and not shape.nested else encode_list(answers)


def _request(item: Any, where: str, delta: Delta, options: Options) -> Request:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {shown(item)}; expected a text or an object with the fields of {delta.task.kind}")
    if delta.task.kind == QUESTION_ANSWERING and options.top_k is not None:
        item = {**item, "top_k": options.top_k}
    return Request(delta.name, item, "", options.needs_logits, where, delta.version)


def _similarity(inputs: dict[str, Any], delta: Delta, options: Options, most: float) -> TaskCall:
    sentences = inputs.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"field 'sentences' is {shown(sentences)}; expected a list of texts")
    check_items(1 + len(sentences), most)
    texts = [inputs["source_sentence"], *sentences]
    names = ["source_sentence", *(f"sentences[{index}]" for index in range(len(sentences)))]
    requests = [
        Request(delta.name, {"text": text}, where=name, version=delta.version)
        for text, name in zip(texts, names, strict=True)
    ]
    return TaskCall(delta, options, requests, single=False, similarity=True)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two vectors; 0 where one of them is."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    sizes = sum(a * a for a in one) * sum(b * b for b in other)
    return float(product / sizes**0.5) if sizes else 0.0
