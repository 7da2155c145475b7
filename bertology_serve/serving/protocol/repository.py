"""The model repository extension of the Open Inference Protocol: index, load, unload. Pure: bytes to structs.

``POST /v2/repository/models/{delta}/load`` may name a version of the served directory, in ``parameters.version`` or in
``parameters.config`` (``{"version": ...}`` as a JSON text, which is how NVIDIA's clients can say it). Files and
addresses are never taken from a call.
"""

from __future__ import annotations

from typing import Any

from bertology_serve.errors import DataError, Unsupported, nearest
from bertology_serve.serving.protocol.json_codec import decode, shown

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


def _config(config: Any) -> dict[str, Any]:
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


def _parameters(body: bytes) -> dict[str, Any]:
    parameters = _object(body).get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise DataError(f"field 'parameters' is {shown(parameters)}; expected an object")
    return parameters


def _object(body: bytes) -> dict[str, Any]:
    value: Any = decode(body) if body.strip() else {}
    if not isinstance(value, dict):
        raise DataError(f"the body is {shown(value)}; expected an object or nothing")
    return value
