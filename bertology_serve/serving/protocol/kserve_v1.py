"""KServe's first protocol, TensorFlow Serving's: ``{"instances": [...]}`` -> ``{"predictions": [...]}``. Pure.

An instance is a text, or an object with the fields that the task reads; a prediction is an answer of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError
from bertology_serve.serving.batching.limits import check_items
from bertology_serve.serving.protocol.json_codec import encode_list, object_of, shown
from bertology_serve.serving.protocol.native import answer_of, read_request


def read_predict(body: bytes, delta: Delta, most: float) -> list[Request]:
    """A call of ``POST /v1/models/{delta}:predict``; DataError, LimitError for more than ``most`` instances."""
    value = object_of(body)
    field = "instances" if "instances" in value else "inputs"
    instances = value.get(field)
    if not isinstance(instances, list):
        raise DataError(f"field 'instances' is {shown(instances)}; expected a list of texts or objects")
    check_items(len(instances), most)
    return [_request(instance, f"{field}[{index}]", delta) for index, instance in enumerate(instances)]


def write_predict(requests: Sequence[Request], predictions: Sequence[Prediction]) -> bytes:
    """The answers in the order of the instances."""
    answers = encode_list(answer_of(*pair) for pair in zip(requests, predictions, strict=True))
    return b'{"predictions":' + answers + b"}"


def _request(instance: Any, where: str, delta: Delta) -> Request:
    record = {"text": instance} if isinstance(instance, str) else instance
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {shown(instance)}; expected a text or an object with the fields of its task")
    return replace(read_request({**record, "delta": delta.name}, where), version=delta.version)
