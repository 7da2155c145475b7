"""Messages to the structs of the Open Inference Protocol, and answers to messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import DataError
from bertology_serve.serving.protocol.oip import AskedOutput, InferCall, InferRequest, tensors_of, version_of
from bertology_serve.serving.protocol.oip import parameters_of as response_parameters
from bertology_serve.serving.protocol.tensors import InputTensor
from bertology_serve.serving.rpc.messages import message

_DATA_TYPES = {"TYPE_STRING": 13, "TYPE_FP32": 11, "TYPE_INT64": 9}


def parameters_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A map of ``InferParameter`` as plain values."""
    found = {}
    for name, parameter in given.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is not None:
            found[name] = getattr(parameter, which)
    return found


def read_infer(asked: Any) -> tuple[InferRequest, list[bytes | None]]:
    """A ``ModelInferRequest`` and its tensors' bytes, ``None`` for those whose contents are typed. DataError."""
    raw = list(asked.raw_input_contents)
    if raw and len(raw) != len(asked.inputs):
        raise DataError(f"raw_input_contents has {len(raw)} entries for {len(asked.inputs)} inputs; expected as many")
    inputs = [
        InputTensor(
            tensor.name, list(tensor.shape), tensor.datatype, parameters_of(tensor.parameters),
            None if raw and not tensor.HasField("contents") else _texts(tensor),
        )
        for tensor in asked.inputs
    ]  # fmt: skip
    outputs = [AskedOutput(output.name, parameters_of(output.parameters)) for output in asked.outputs]
    request = InferRequest(inputs, asked.id or None, parameters_of(asked.parameters), outputs or None)
    return request, list(raw) if raw else [None] * len(inputs)


def write_infer(call: InferCall, predictions: Sequence[Prediction]) -> Any:
    """A ``ModelInferResponse``; its tensors are raw bytes."""
    response = message("ModelInferResponse")(
        model_name=call.model.name, model_version=version_of(call, predictions) or "", id=call.id or ""
    )
    for name, value in response_parameters(predictions).items():
        response.parameters[name].string_param = value
    for tensor in tensors_of(call, predictions):
        _, blob = tensor.as_binary()
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(blob)
    return response


def config(known: Mapping[str, Any]) -> Any:
    """A ``ModelConfigResponse`` of what ``oip_model.config`` gives."""
    tensors = {
        which: [tensor | {"data_type": _DATA_TYPES[tensor["data_type"]]} for tensor in known[which]]
        for which in ("input", "output")
    }
    parameters = {name: message("ModelParameter")(**value) for name, value in known["parameters"].items()}
    return message("ModelConfigResponse")(config={**known, **tensors, "parameters": parameters})


def statistics(entries: Iterable[Mapping[str, Any]]) -> Any:
    """A ``ModelStatisticsResponse`` of what ``Statistics.of`` gives."""
    response = message("ModelStatisticsResponse")()
    for entry in entries:
        response.model_stats.add(**{name: value for name, value in entry.items() if name != "batch_stats"})
    return response


def _texts(tensor: Any) -> list[Any]:
    try:
        return [element.decode() for element in tensor.contents.bytes_contents]
    except UnicodeDecodeError:
        raise DataError(f"input {tensor.name!r}: an element is not UTF-8; expected texts") from None
