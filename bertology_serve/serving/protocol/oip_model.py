"""A delta as a model of the Open Inference Protocol: its tensors, its metadata, the repository's calls. Pure.

``POST /v2/repository/models/{delta}/load`` may name a version of the served directory, in ``parameters.version`` or in
``parameters.config`` (``{"version": ...}`` as a JSON text, which is how NVIDIA's clients can say it). Files and
addresses are never taken from a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve import __version__
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import DataError, Unsupported, nearest
from bertology_serve.files import JsonMapping, JsonObject
from bertology_serve.serving.protocol.json_codec import decode, shown
from bertology_serve.tasks import spec as tasks

PLATFORM = "bertology_packed"
EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics")
_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "INT64": "TYPE_INT64"}  # as NVIDIA's configurations name them


@dataclass(frozen=True)
class Field:
    """One output: its tensor type, and the size of its second dimension (0: none, -1: known only with the answer).

    What has a third one, ``depth``, and where the answer says how much there is, is filled up with zeros; ``index``
    with -1, which stands for no word.
    """

    datatype: str
    width: int = 0
    depth: int = 0

    @property
    def shape(self) -> list[int]:
        """As the metadata has it, -1 for what is not known before."""
        return [-1, *filter(None, (self.width, self.depth))]


TEXT, NUMBER, INDEX = Field("BYTES"), Field("FP32"), Field("INT64")
ANY_TASK = {"delta": TEXT, "version": TEXT, "result_json": TEXT}
_INPUTS: dict[str, dict[str, int]] = {  # name -> dimensions
    tasks.CLASSIFICATION: {"text": 1, "text_pair": 1},
    tasks.MULTI_LABEL: {"text": 1, "text_pair": 1},
    tasks.REGRESSION: {"text": 1, "text_pair": 1},
    tasks.EMBEDDING: {"text": 1, "text_pair": 1},
    tasks.SPARSE: {"text": 1, "text_pair": 1},
    tasks.MULTI_VECTOR: {"text": 1, "text_pair": 1},
    tasks.TOKEN_CLASSIFICATION: {"text": 1, "tokens": 2},
    tasks.QUESTION_ANSWERING: {"question": 1, "context": 1},
    tasks.MULTIPLE_CHOICE: {"premise": 1, "question": 1, "choices": 2},
    tasks.ZERO_SHOT: {"text": 1, "text_pair": 1, "labels": 2},
}
# One pair of tensors for every task, so that rows of different tasks can share a request
_GENERAL = {
    tasks.QUESTION_ANSWERING: {"text": "question", "text_pair": "context"},
    tasks.MULTIPLE_CHOICE: {"text": "premise", "text_pair": "choices"},
}
LISTS = ("tokens", "choices", "labels")
INPUTS = tuple(dict.fromkeys(name for inputs in _INPUTS.values() for name in inputs))


def record_of(delta: Delta, row: Mapping[str, Sequence[str]], where: str) -> JsonObject:
    """One row's texts by input name as the record that the delta's task reads; empty texts count as absent.

    DataError for texts that the task would not read: nothing that was sent is left out of an answer.
    """
    kind = delta.task.kind
    names = dict(zip(_INPUTS[kind], _INPUTS[kind], strict=True)) | _GENERAL.get(kind, {})
    record: JsonObject = {}
    for name, texts in row.items():
        if not texts:
            continue
        field = names.get(name)
        if field is None:
            raise DataError(f"{where}: {kind} reads no input {name!r}; expected {', '.join(names)}")
        if field in record or {field, *record} >= {"text", "tokens"}:
            raise DataError(f"{where}: input {name!r} repeats what another input says; send one of them")
        record[field] = list(texts) if field in LISTS else only(texts, name, where)
    return record


def only(texts: Sequence[str], name: str, where: str) -> str:
    """The text of a row that may hold one; DataError where it holds more."""
    if len(texts) > 1:
        raise DataError(
            f"{where}: input {name!r} holds {len(texts)} texts; expected one: shape [n] for n items, "
            "the second text of a pair in 'text_pair'"
        )
    return texts[0]


def outputs_of(delta: Delta) -> dict[str, Field]:
    """The outputs that a delta can give, those of its task first."""
    labels = len(delta.task.labels)
    own = {
        tasks.CLASSIFICATION: {
            "label": TEXT, "score": NUMBER, "scores": Field("FP32", labels), "logits": Field("FP32", labels),
        },
        tasks.MULTI_LABEL: {"scores": Field("FP32", labels), "logits": Field("FP32", labels)},
        tasks.REGRESSION: {"value": NUMBER, "logits": Field("FP32", 1)},
        tasks.EMBEDDING: {"embedding": Field("FP32", -1)},
        tasks.SPARSE: {"index": Field("INT64", -1), "value": Field("FP32", -1)},
        tasks.MULTI_VECTOR: {"vectors": Field("FP32", -1, delta.task.width), "vector_count": INDEX},
        tasks.MULTIPLE_CHOICE: {"choice": INDEX, "score": NUMBER},
    }  # fmt: skip
    return own.get(delta.task.kind, {}) | ANY_TASK


def default_outputs(delta: Delta) -> list[str]:
    """What is given when nothing is asked for; labels of which any number applies are in ``result_json``."""
    own = [name for name in outputs_of(delta) if name not in (*ANY_TASK, "logits")]
    return [*own, "result_json"] if delta.task.kind == tasks.MULTI_LABEL or not own else own


def metadata(delta: Delta) -> JsonObject:
    """The answer to ``GET /v2/models/{name}``."""
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [-1] * dimensions}
        for name, dimensions in _INPUTS[delta.task.kind].items()
    ]
    outputs = [
        {"name": name, "datatype": field.datatype, "shape": field.shape} for name, field in outputs_of(delta).items()
    ]
    return {
        "name": delta.name,
        "versions": [delta.version],
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"task": delta.task.kind, "max_length": delta.task.max_length},
    }


def config(delta: Delta) -> JsonObject:
    """The answer to ``GET /v2/models/{name}/config``: what NVIDIA's ``ModelConfig`` can say of a delta.

    ``max_batch_size`` is 0: ``dims`` are whole shapes, as in the metadata, and the server batches by itself.
    """
    known = metadata(delta)
    always = () if delta.task.kind == tasks.TOKEN_CLASSIFICATION else ("text",)
    return {
        "name": delta.name,
        "platform": PLATFORM,
        "backend": "",
        "max_batch_size": 0,
        "input": [_configured(tensor) | {"optional": tensor["name"] not in always} for tensor in known["inputs"]],
        "output": [_configured(tensor) for tensor in known["outputs"]],
        "parameters": {name: {"string_value": str(value)} for name, value in known["parameters"].items()},
    }


def _configured(tensor: JsonMapping) -> JsonObject:
    return {"name": tensor["name"], "data_type": _TYPES[tensor["datatype"]], "dims": tensor["shape"]}


def server_metadata() -> JsonObject:
    """The answer to ``GET /v2``."""
    return {"name": "bertology-serve", "version": __version__, "extensions": list(EXTENSIONS)}


PARAMETERS = ("version", "config")
CONFIG = ("version",)


def read_index(body: bytes) -> bool:
    """Whether only what is ready is asked for; the body may be empty."""
    ready = _object(body).get("ready", False)
    if not isinstance(ready, bool):
        raise DataError(f"field 'ready' is {shown(ready)}; expected true or false")
    return ready


def read_load(body: bytes) -> str | None:
    """The version to load, ``None`` for the newest; the body may be empty. DataError; Unsupported for files."""
    parameters = _parameters(body)
    for name in parameters:
        if name.startswith("file:"):
            raise Unsupported("files are not taken from a call; put the delta below the served directory")
        if name not in PARAMETERS:
            raise DataError(f"unknown parameter {name[:40]!r}; {nearest(name[:40], PARAMETERS)}")
    named = _config(parameters.get("config"))
    version = parameters.get("version", named.get("version"))
    if version is not None and not isinstance(version, str):
        raise DataError(f"parameter 'version' is {shown(version)}; expected a text")
    return version


def read_unload(body: bytes) -> None:
    """Checks the body, which may be empty; no parameter changes anything."""
    _parameters(body)


def _config(config: Any) -> JsonObject:
    """What a configuration asks for. Nothing of a delta's own can be set by a call; DataError, Unsupported."""
    if config is not None and not isinstance(config, str):
        raise DataError(f"failed to load: parameter 'config' is {shown(config)}; expected a JSON text")
    try:
        named = _object(config.encode("utf-8", "surrogatepass")) if config else {}
    except DataError:
        raise DataError("failed to load: parameter 'config' is not JSON, or no object") from None
    for name in named:
        if name not in CONFIG:
            raise Unsupported(
                f"failed to load: 'config' sets {name[:40]!r}, which a call cannot change; expected {', '.join(CONFIG)}"
            )
    return named


def _parameters(body: bytes) -> JsonObject:
    parameters = _object(body).get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise DataError(f"field 'parameters' is {shown(parameters)}; expected an object")
    return parameters


def _object(body: bytes) -> JsonObject:
    value: Any = decode(body) if body.strip() else {}
    if not isinstance(value, dict):
        raise DataError(f"the body is {shown(value)}; expected an object or nothing")
    return value
