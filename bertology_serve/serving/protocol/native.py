"""This project's own shape, and KServe's first protocol, which answers in it. Pure: bytes in, bytes out.

``/predict`` takes requests with the fields of a record, and answers as in the README; one with ``deltas`` in place of
``delta`` asks all of them, ``{"deltas": {NAME: answer}}``, and its text is computed once as far as they let it.
KServe's ``{"instances": [...]}`` -> ``{"predictions": [...]}``: an instance is a text, or an object with the fields
that the task reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError
from bertology_serve.files import JsonObject
from bertology_serve.serving.protocol.json_codec import check_items, decode, encode, encode_list, object_of, shown
from bertology_serve.tasks.fields import divided


@dataclass(frozen=True)
class NativeCall:
    """The requests of one body; ``single`` says that it held one object rather than a list.

    ``several`` are the numbers of requests of one item with ``deltas``: first and last of each.
    """

    requests: list[Request]
    single: bool
    several: Sequence[range] = ()


INPUTS = b'"inputs"'  # what no body for TEI's ``/predict`` lacks


def is_tei(body: bytes) -> bool:
    """Whether a body is one for TEI's ``/predict``: an object with ``inputs``, without ``delta`` or ``deltas``."""
    value: Any = decode(body)
    return isinstance(value, dict) and "inputs" in value and not {"delta", "deltas"} & value.keys()


def read_call(body: bytes, most: float, find: Callable[[str], Delta]) -> NativeCall:
    """``{"delta", "id"?, "logits"?, ...fields of the record}`` or a list of those, for any deltas together; with
    ``deltas``, a list of names, in place of ``delta`` an item asks each of them. Options that only some of those take
    are for those; ``find`` is asked for their tasks, and raises what it does.

    LimitError for more than ``most`` answers.
    """
    value: Any = decode(body)
    if isinstance(value, dict) and value.get("deltas") is None:
        return NativeCall([read_request(value, "request")], single=True)
    if not isinstance(value, list | dict):
        raise DataError(f"the body is {shown(value)}; expected an object with 'delta' and 'text', or a list of those")
    items, single = ([value], True) if isinstance(value, dict) else (value, False)
    check_items(len(items), most)
    requests, several = list[Request](), list[range]()
    for index, item in enumerate(items):
        first = len(requests)
        requests += read_item(item, "request" if single else f"item {index}", most, find, first)
        if asks_several(item):
            several.append(range(first, len(requests)))
    return NativeCall(requests, single, several)


def asks_several(item: Any) -> bool:
    """Whether an item asks ``deltas``, whose answers stand together."""
    return isinstance(item, dict) and item.get("deltas") is not None


def read_item(item: Any, where: str, most: float, find: Callable[[str], Delta], before: int = 0) -> list[Request]:
    """The requests of one item, one for each delta that it asks; with ``before`` others no more than ``most``."""
    if not asks_several(item):
        return [read_request(item, where)]
    names = _names(item, where)
    check_items(before + len(names), most)
    record = {name: value for name, value in item.items() if name not in ("deltas", "delta")}
    own = divided(record, where, {name: find(name).task.kind for name in names})
    return [read_request({**own[name], "delta": name}, where) for name in names]


def _names(item: JsonObject, where: str) -> list[str]:
    names = item["deltas"]
    if item.get("delta") is not None:
        raise DataError(f"{where}: fields 'delta' and 'deltas' both name deltas; send one of them")
    if not isinstance(names, list):
        raise DataError(f"{where}: field 'deltas' is {shown(names)}; expected a list of names of deltas")
    wrong = next((name for name in names if not isinstance(name, str) or not name), None)
    if not names or wrong is not None:
        raise DataError(f"{where}: field 'deltas' holds {shown(wrong) if names else 'nothing'}; expected names")
    if len(set(names)) != len(names):
        raise DataError(f"{where}: field 'deltas' names a delta twice; name each once")
    return names


def read_request(item: Any, where: str) -> Request:
    """One request; ``where`` is how messages call it. Fields that nobody reads are ignored."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {shown(item)}; expected an object with 'delta' and the fields of its task")
    delta, name, logits = item.get("delta"), item.get("id"), item.get("logits")
    if not isinstance(delta, str) or not delta:
        raise DataError(f"{where}: field 'delta' is {shown(delta)}; expected the name of a delta")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise DataError(f"{where}: field 'id' is {shown(name)}; expected a text")
    if logits is not None and not isinstance(logits, bool):
        raise DataError(f"{where}: field 'logits' is {shown(logits)}; expected true or false")
    return Request(delta, item, logits=bool(logits), where=where)


def write_answers(call: NativeCall, predictions: Sequence[Prediction]) -> bytes:
    """The answers in the order of the requests: a list for a list, an object for an object."""
    answers = [answer_of(*pair) for pair in zip(call.requests, predictions, strict=True)]
    if call.several:
        answers = _grouped(call, answers)
    return encode(answers[0]) if call.single else encode_list(answers)


def _grouped(call: NativeCall, answers: Sequence[JsonObject]) -> list[JsonObject]:
    """Those of an item with ``deltas`` as one, by the names of its deltas."""
    found, last = list[JsonObject](), 0
    for group in call.several:
        found += answers[last : group.start]
        found.append(as_one([call.requests[i].delta for i in group], answers[group.start : group.stop]))
        last = group.stop
    return [*found, *answers[last:]]


def as_one(deltas: Sequence[str], answers: Sequence[JsonObject]) -> JsonObject:
    """The answers of one item's deltas as one object, with the id that each of them has."""
    ids = [answer.pop("id") for answer in answers if "id" in answer]
    return {**({"id": ids[0]} if ids else {}), "deltas": dict(zip(deltas, answers, strict=True))}


def answer_of(request: Request, prediction: Prediction) -> JsonObject:
    """One answer, with the request's own id as it was sent."""
    name = request.record.get("id")
    return prediction.as_dict() if name is None else {"id": name, **prediction.as_dict()}


def describe(delta: Delta) -> JsonObject:
    """What ``GET /models`` tells about a delta."""
    task = delta.task
    return {
        "name": delta.name,
        "version": delta.version,
        "task": task.kind,
        "labels": list(task.labels),
        "kinds": list(delta.kinds) if delta.name != "base" else [],
        "max_length": task.max_length,
        "bytes": delta.bytes,
        "metrics": dict(delta.metrics),
        "pairs": task.pairs,
    }


def read_instances(body: bytes, delta: Delta, most: float) -> NativeCall:
    """A call of ``POST /v1/models/{delta}:predict``; DataError, LimitError for more than ``most`` instances."""
    value = object_of(body)
    field = "instances" if "instances" in value else "inputs"
    instances = value.get(field)
    if not isinstance(instances, list):
        raise DataError(f"field 'instances' is {shown(instances)}; expected a list of texts or objects")
    check_items(len(instances), most)
    return NativeCall([_request(one, f"{field}[{index}]", delta) for index, one in enumerate(instances)], single=False)


def write_predictions(call: NativeCall, predictions: Sequence[Prediction]) -> bytes:
    """The answers in the order of the instances."""
    answers = encode_list(answer_of(*pair) for pair in zip(call.requests, predictions, strict=True))
    return b'{"predictions":' + answers + b"}"


def _request(instance: Any, where: str, delta: Delta) -> Request:
    record = {"text": instance} if isinstance(instance, str) else instance
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {shown(instance)}; expected a text or an object with the fields of its task")
    return read_request({**record, "delta": delta.name}, where)
