"""The OpenAPI 3.1 document: every route with every answer that it gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from bertology_serve import __version__
from bertology_serve.serving.gate import PUBLIC
from bertology_serve.serving.http import PRIORITY, TIMEOUT
from bertology_serve.serving.protocol.schemas import BODIES

REF = "#/components/schemas/{name}"
_BAD, _UNKNOWN, _LARGE, _BUSY, _LATE = "400", "404", "413", "503", "504"
_MEANINGS = {
    _BAD: "The body, a field or an option cannot be used.",
    _UNKNOWN: "There is no such delta or version.",
    "408": "The body came too slowly.",
    _LARGE: "The body, a text or the number of items is over its limit.",
    "401": "There is no valid API key.",
    "403": "The API key does not open this.",
    "429": "The API key's rate is used up; Retry-After says for how long.",
    "431": "The path and headers are over their limit.",
    _LATE: "The deadline came before the answer; what was queued is not computed.",
    "500": "A fault of the server.",
}
_GATE = ("401", "403", "429", "431")
_RETRY = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
_TIMEOUT = {
    "name": TIMEOUT,
    "in": "header",
    "description": "Milliseconds that the caller will wait",
    "schema": {"type": "integer", "minimum": 1},
}
_PRIORITY = {
    "name": PRIORITY,
    "in": "header",
    "description": "Of one delta's waiting work the lowest number goes first; 5 where nothing is said",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_ITEMS = (_BAD, _UNKNOWN, "408", _LARGE, *_GATE, "500")


@cache
def document() -> dict[str, Any]:
    """The document; the same for every server of this version."""
    _, components = msgspec.json.schema_components(BODIES, ref_template=REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bertology-serve",
            "version": __version__,
            "description": "Many deltas on one encoder, answered in one packed batch. No Content-Type is needed.",
        },
        "paths": _paths(),
        "components": {"schemas": components, "securitySchemes": _SCHEMES},
        "security": [{name: []} for name in _SCHEMES],
    }


def _paths() -> dict[str, Any]:
    item, model = _ref("Item"), _ref("Model")
    infer = _post("Infer (Open Inference Protocol v2)", _ref("InferRequest"), _ref("InferResponse"), binary=True)
    about = _get("Metadata of a delta", _ref("ModelMetadata"), _UNKNOWN)
    config = _get("Configuration of a delta", {"type": "object"}, _UNKNOWN)
    done = _get("What a delta has done", {"type": "object"}, _UNKNOWN)
    is_ready = _get("Readiness", {"type": "object"}, _UNKNOWN, _BUSY)
    paths = {
        "/predict": {"post": _post("Answer items of any deltas, or TEI's /predict", _items(item), _answers())},
        "/models": {"get": _get("The deltas that answer", {"type": "array", "items": model})},
        "/models/{delta}": {
            "get": _get("About a delta", model, _UNKNOWN),
            "post": _post("Answer in HuggingFace's task shape", _ref("TaskBody"), {}),
        },
        "/models/{delta}/info": {"get": _get("About a delta", model, _UNKNOWN)},
        "/models/{delta}/health": {"get": is_ready},
        "/v1/embeddings": {"post": _post("Embeddings in OpenAI's shape", _ref("EmbeddingsBody"), _ref("Embeddings"))},
        "/v1/models": {"get": _get("The deltas in OpenAI's shape", {"type": "object"})},
        "/v1/models/{delta}": {"get": _get("A delta in OpenAI's shape", {"type": "object"}, _UNKNOWN)},
        "/v2": {"get": _get("About the server", _ref("ServerMetadata"))},
        "/v2/health/live": {"get": _get("Liveness", {"type": "object"})},
        "/v2/health/ready": {"get": _get("Readiness", {"type": "object"}, _BUSY)},
        "/v2/models": {"get": _get("Names of the deltas that answer", {"type": "object"})},
        "/v2/models/stats": {"get": _get("What each delta has done", {"type": "object"})},
        **{
            f"/v2/models/{{delta}}{version}{end}": {method: operation}
            for version in ("", "/versions/{version}")
            for end, method, operation in (
                ("", "get", about),
                ("/config", "get", config),
                ("/ready", "get", is_ready),
                ("/stats", "get", done),
                ("/infer", "post", infer),
            )
        },
        "/v2/repository/index": {"post": _manage("Every version on disk or in service", "index")},
        "/v2/repository/models/{delta}/load": {"post": _manage("Load a version, or swap to it", "load")},
        "/v2/repository/models/{delta}/rollback": {"post": _manage("Back to the version before", "rollback")},
        "/v2/repository/models/{delta}/unload": {"post": _manage("Take a delta away", "unload")},
        **_tei_paths(),
        "/health": {"get": _get("State of the server", {"type": "object"})},
        "/metrics": {"get": _get("Prometheus metrics", None)},
        "/openapi.json": {"get": _get("This document", {"type": "object"})},
        "/": {"get": _get("About the server", {"type": "object"})},
    }
    for path in PUBLIC:
        paths[path]["get"]["security"] = []
    for path in paths:
        if path.startswith("/v1/"):
            _in_openai_s_shape(paths[path])
    return {path: _with_parameters(path, operations) for path, operations in paths.items()}


def _tei_paths() -> dict[str, Any]:
    """Text Embeddings Inference's routes, at the root and below a delta's name; /predict at the root is ours too."""
    posts = {
        "embed": ("Embeddings", "TeiBody"),
        "rerank": ("Rank texts", "TeiRerankBody"),
        "similarity": ("Compare texts", "TeiSimilarityBody"),
        "tokenize": ("Texts to tokens", "TeiTokenizeBody"),
        "decode": ("Tokens to texts", "TeiDecodeBody"),
        "predict": ("Classify", "TeiBody"),
    }
    paths = {}
    for base in ("", "/tei/{delta}"):
        for name, (summary, body) in posts.items():
            if base or name != "predict":
                paths[f"{base}/{name}"] = {"post": _post(f"{summary} (TEI's shape)", _ref(body), {"type": "array"})}
        paths[f"{base}/info"] = {"get": _get("About a delta (TEI's shape)", {"type": "object"}, _BAD, _UNKNOWN)}
    model = {"name": "model", "in": "query", "description": "Name of a delta", "schema": {"type": "string"}}
    paths["/info"]["get"]["parameters"] = [model]
    return paths


def _in_openai_s_shape(operations: dict[str, Any]) -> None:
    """The errors under /v1 are objects."""
    for operation in operations.values():
        for code, response in operation["responses"].items():
            if code != "200":
                response["content"] = {"application/json": {"schema": _ref("OpenAIProblem")}}


def _get(summary: str, schema: dict[str, Any] | None, *problems: str) -> dict[str, Any]:
    content = {"text/plain": {}} if schema is None else {"application/json": {"schema": schema}}
    found = {"200": {"description": "OK", "content": content}} | {
        code: _problem(code) for code in (*problems, *_GATE, "500")
    }
    if _BUSY in problems:
        found[_BUSY] = {"description": "The server is draining.", "content": content}
    return {"summary": summary, "responses": found}


def _post(summary: str, body: dict[str, Any], answer: dict[str, Any], binary: bool = False) -> dict[str, Any]:
    accepted, given = {"application/json": {"schema": body}}, {"application/json": {"schema": answer}}
    if binary:
        octets: dict[str, Any] = {"application/octet-stream": {}}
        accepted, given = accepted | octets, given | octets
    busy = _problem(_BUSY) | {"description": "The queue is full, or the server is stopping.", "headers": _RETRY}
    return {
        "summary": summary,
        "parameters": [_TIMEOUT, _PRIORITY],
        "requestBody": {"required": True, "content": accepted},
        "responses": {
            "200": {"description": "OK", "content": given},
            **{code: _problem(code) for code in _ITEMS},
            _BUSY: busy,
            _LATE: _problem(_LATE),
        },
    }


def _manage(summary: str, what: str) -> dict[str, Any]:
    """A route for API keys with admin rights. Its body may be empty."""
    body, entry = _ref("IndexRequest" if what == "index" else "LoadRequest"), _ref("RepositoryEntry")
    answer = {"type": "array", "items": entry} if what == "index" else entry
    return {
        "summary": f"{summary} (admin)",
        "requestBody": {"required": False, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": answer}}},
            **{code: _problem(code) for code in _ITEMS},
        },
    }


def _problem(code: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Problem")}}
    found = {"description": _MEANINGS.get(code, ""), "content": content}
    return found | {"headers": _RETRY} if code == "429" else found


def _with_parameters(path: str, operations: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in ("delta", "version") if f"{{{name}}}" in path]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": parameters, **operations} if parameters else operations


def _answers() -> dict[str, Any]:
    """An answer, a list of them, or TEI's labels with scores."""
    return {"anyOf": [_ref("Answer"), {"type": "array", "items": {"anyOf": [_ref("Answer"), {}]}}]}


def _items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "array", "items": schema}, _ref("TeiBody")]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(name=name)}
