"""Open Inference Protocol v2 (KServe v2): infer requests and responses. Pure: bytes to requests, answers to bytes.

A model is a delta. Each row of the input tensors is one item: [n], or [n, k] for tokens and choices, whose rows are
filled up with empty texts. What a row holds beyond what its delta reads is refused. Rows may name deltas of their own,
in ``parameters.deltas`` (a list, or names with commas between them) or in an input tensor ``delta``; an empty name is
the model of the URL. Several names for a single row ask each of them: the outputs have a row for each name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import DataError, Unsupported, nearest
from bertology_serve.files import JsonObject
from bertology_serve.serving.protocol.json_codec import decode, encode, shown
from bertology_serve.serving.protocol.oip_model import (
    ANY_TASK,
    INPUTS,
    Field,
    default_outputs,
    only,
    outputs_of,
    record_of,
)
from bertology_serve.serving.protocol.tensors import (
    InputTensor,
    OutputTensor,
    Parameters,
    check_parameters,
    read_texts,
    split,
)
from bertology_serve.tasks.fields import BY_KIND
from bertology_serve.tasks.spec import EMBEDDING, SPARSE, VECTOR_KINDS

DELTA = "delta"
HERE = ("input_type", "dimensions")
"""Options of some tasks that parameters may be; the others would change what is answered, and are refused."""
ELSEWHERE = (*(name for name in BY_KIND if name not in HERE), "normalize", "multi_label", "template")
Find = Callable[[str], Delta]


class AskedOutput(msgspec.Struct):
    """One output that the caller wants. Raises what ``check_parameters`` does."""

    name: str
    parameters: Parameters | None = None

    def __post_init__(self) -> None:
        check_parameters(f"output {self.name[:80]!r}", self.parameters)


class InferRequest(msgspec.Struct):
    """The JSON part of an infer request; other keys are ignored."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[AskedOutput] | None = None


@dataclass(frozen=True)
class InferCall:
    """A checked infer request: one request a row, and the outputs wanted, each in JSON or (true) in binary.

    ``seconds`` is how long the caller will wait, ``priority`` 1 goes first, 0 is none.
    """

    model: Delta
    id: str | None
    requests: list[Request]
    outputs: Mapping[str, bool]
    fields: Mapping[str, Field]
    seconds: float = math.inf
    priority: int = 0


def read_infer(body: bytes, json_length: int | None, model: Delta, find: Find, most: int) -> InferCall:
    """An infer request for ``model``; ``json_length`` is the header Inference-Header-Content-Length.

    See ``read_call``.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise DataError(f"Inference-Header-Content-Length is {json_length}; the body has {len(body)} bytes")
    end = len(body) if json_length is None else json_length
    asked: InferRequest = decode(body[:end], InferRequest)
    return read_call(asked, split(asked.inputs, body[end:]), model, find, most)


def read_call(asked: InferRequest, blobs: Sequence[bytes | None], model: Delta, find: Find, most: int) -> InferCall:
    """A request whose tensors' binary parts lie apart (``None``: the data is in the tensor).

    ``find`` gives the delta of a name or raises NotFound; ``most`` bounds rows and columns. Raises DataError and
    LimitError.
    """
    columns = _columns(asked, blobs, most)
    parameters = asked.parameters or {}
    alien = next((name for name in ELSEWHERE if parameters.get(name) not in (None, False)), None)
    if alien:
        raise Unsupported(f"parameter {alien!r} is not supported under /v2; leave it out, or ask /predict")
    deltas = _deltas(parameters, columns, model, find, most)
    fields = _common_outputs(deltas)
    outputs = _wanted(asked, deltas, fields)
    logits = _flag(parameters, "logits") or "logits" in outputs
    if _flag(parameters, "logits") and "logits" in fields and not asked.outputs:
        outputs["logits"] = _flag(parameters, "binary_data_output")
    requests = []
    for row, delta in enumerate(deltas):
        texts = {name: column[row] for name, column in columns.items() if name != DELTA}
        where = f"row {row}"
        record = record_of(delta, texts, where)
        if delta.task.kind in VECTOR_KINDS:
            asked_for = HERE if delta.task.kind == EMBEDDING else ("input_type",)
            record |= {name: parameters[name] for name in asked_for if name in parameters}
        requests.append(Request(delta.name, record, "", logits, where))
    priority = _whole(parameters, "priority", 10**9, "a whole number, 1 goes first")
    return InferCall(model, asked.id, requests, outputs, fields, _seconds(parameters), priority)


def tensors_of(call: InferCall, predictions: Sequence[Prediction]) -> list[OutputTensor]:
    """The outputs that the call wants."""
    return [_tensor(name, call.fields[name], predictions) for name in call.outputs]


def version_of(call: InferCall, predictions: Sequence[Prediction]) -> str | None:
    """The version of the model of the URL that answered, where there was one."""
    versions = {prediction.version for prediction in predictions if prediction.delta == call.model.name}
    return versions.pop() if len(versions) == 1 else None


def parameters_of(predictions: Sequence[Prediction]) -> Parameters:
    """``truncated``: the rows whose texts were cut, with commas between them; left out where none was."""
    cut = ",".join(str(row) for row, prediction in enumerate(predictions) if prediction.truncated)
    return {"truncated": cut} if cut else {}


def write_infer(call: InferCall, predictions: Sequence[Prediction]) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON part where binary tensors follow it."""
    parts, blobs = [], []
    for tensor in tensors_of(call, predictions):
        if call.outputs[tensor.name]:
            part, blob = tensor.as_binary()
            blobs.append(blob)
        else:
            part = tensor.as_json()
        parts.append(part)
    response: JsonObject = {"model_name": call.model.name}
    version = version_of(call, predictions)
    if version is not None:
        response["model_version"] = version
    if call.id is not None:
        response["id"] = call.id
    parameters = parameters_of(predictions)
    if parameters:
        response["parameters"] = parameters
    header = encode(response | {"outputs": parts})
    return (header + b"".join(blobs), len(header)) if blobs else (header, None)


def _columns(asked: InferRequest, blobs: Sequence[bytes | None], most: int) -> dict[str, list[list[str]]]:
    """Each input tensor as rows of texts, all of the same length."""
    columns: dict[str, list[list[str]]] = {}
    for tensor, blob in zip(asked.inputs, blobs, strict=True):
        if tensor.name not in (*INPUTS, DELTA):
            raise DataError(f"unknown input {tensor.name[:80]!r}; {nearest(tensor.name[:80], (*INPUTS, DELTA))}")
        if tensor.name in columns:
            raise DataError(f"input {tensor.name!r} is given twice")
        columns[tensor.name] = read_texts(tensor, blob, most)
    if not columns:
        raise DataError(f"there are no inputs; expected some of {', '.join(INPUTS)}")
    sizes = {name: len(rows) for name, rows in columns.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"inputs differ in rows: {', '.join(f'{name} {count}' for name, count in sizes.items())}")
    return columns


def _deltas(
    parameters: Parameters, columns: dict[str, list[list[str]]], model: Delta, find: Find, most: int
) -> list[Delta]:
    """The delta of each row; a single row is repeated for several, ``most`` at most."""
    rows = len(next(iter(columns.values())))
    named = parameters.get("deltas")
    if named is not None and DELTA in columns:
        raise DataError(f"parameter 'deltas' and input {DELTA!r} both name deltas; send one of them")
    if isinstance(named, str):
        named = [name.strip() for name in named.split(",")]
    if named is None:
        cells = columns.get(DELTA, [[]] * rows)
        named = [only(texts, DELTA, f"row {row}") if texts else "" for row, texts in enumerate(cells)]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise DataError("parameter 'deltas' is no list of names; expected one name of a delta for each row")
    if rows == 1 < len(named) <= most:
        columns |= {name: column * len(named) for name, column in columns.items()}
        rows = len(named)
    if len(named) != rows:
        raise DataError(f"parameter 'deltas' names {len(named)} deltas for {rows} rows; expected one for each row")
    found = {name: find(name) for name in dict.fromkeys(named) if name}
    return [found.get(name, model) for name in named]


def _common_outputs(deltas: Sequence[Delta]) -> dict[str, Field]:
    """The outputs that all rows can give in one tensor."""
    distinct = {delta.name: outputs_of(delta) for delta in deltas}
    tables = list(distinct.values()) or [ANY_TASK]
    return {name: field for name, field in tables[0].items() if all(table.get(name) == field for table in tables)}


def _wanted(asked: InferRequest, deltas: Sequence[Delta], fields: Mapping[str, Field]) -> dict[str, bool]:
    """Names of the outputs to give, each with whether it goes into the binary part."""
    binary = _flag(asked.parameters or {}, "binary_data_output")
    if not asked.outputs:
        names = {delta.name for delta in deltas}
        chosen = default_outputs(deltas[0]) if len(names) == 1 else list(ANY_TASK)
        return dict.fromkeys(chosen, binary)
    wanted: dict[str, bool] = {}
    for output in asked.outputs:
        if output.name in wanted:
            raise DataError(f"output {output.name!r} is asked for twice")
        if output.name not in fields:
            raise DataError(
                f"output {output.name[:80]!r} is not given by the deltas of all rows; "
                f"{nearest(output.name[:80], fields)}"
            )
        own = (output.parameters or {}).get("binary_data")
        wanted[output.name] = binary if own is None else _flag(output.parameters or {}, "binary_data")
    return wanted


def _seconds(parameters: Parameters) -> float:
    """``parameters.timeout`` is in microseconds; 0 is none."""
    value = _whole(parameters, "timeout", math.inf, "a whole number of microseconds")
    return min(value, 10**15) / 1e6 if value else math.inf


def _whole(parameters: Parameters, name: str, most: float, expected: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < most:
        raise DataError(f"parameter {name!r} is {shown(value)}; expected {expected}")
    return value


def _flag(parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise DataError(f"parameter {name!r} is {shown(value)}; expected true or false")
    return value


def _tensor(name: str, field: Field, predictions: Sequence[Prediction]) -> OutputTensor:
    rows = [_value(name, prediction) for prediction in predictions]
    if not field.width:
        return OutputTensor(name, field.datatype, (len(rows),), rows)
    width = field.width if field.width > 0 else max(map(len, rows), default=0)
    empty: Any = [0.0] * field.depth if field.depth else -1 if field.datatype == "INT64" else 0.0
    values = [value for row in rows for value in (*row, *[empty] * (width - len(row)))]
    if not field.depth:
        return OutputTensor(name, field.datatype, (len(rows), width), values)
    return OutputTensor(
        name, field.datatype, (len(rows), width, field.depth), [one for value in values for one in value]
    )


def _value(name: str, prediction: Prediction) -> Any:
    if name == "result_json":
        return encode(prediction.as_dict()).decode()
    if name in ANY_TASK:
        return getattr(prediction, name)
    if prediction.task == SPARSE:
        return [entry[name] for entry in prediction.answer["sparse"]]
    if name == "vector_count":
        return len(prediction.answer["vectors"])
    value = prediction.answer[name]
    if name == "label":  # a delta that abstains names none
        return value or ""
    return list(value.values()) if name == "scores" else value
