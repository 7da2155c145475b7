"""The OpenAPI 3.1 document: every route with every answer that it gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from bertology_serve import __version__
from bertology_serve.files import JsonObject
from bertology_serve.serving.http.bodies import PRIORITY, TIMEOUT, TRUNCATED
from bertology_serve.serving.http.gate import PUBLIC
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
_CUT = {TRUNCATED: {"description": "Items whose text was cut; left out where none", "schema": {"type": "integer"}}}
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
_OBJECT, _NUMBER = {"type": "object"}, {"type": "number"}
_ITEMS = (_BAD, _UNKNOWN, "408", _LARGE, *_GATE, "500")


@cache
def document() -> JsonObject:
    """The document; the same for every server of this version."""
    _, components = msgspec.json.schema_components(BODIES, ref_template=REF)
    _with_items(components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bertology-serve",
            "version": __version__,
            "description": "Many deltas on one encoder, answered in one packed batch. No Content-Type is needed.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The server that this document came from"}],
        "paths": _paths(),
        "components": {"schemas": components, "securitySchemes": _SCHEMES},
        "security": [{name: []} for name in _SCHEMES],
    }


def _paths() -> JsonObject:
    """Every path with its operations; what stands twice is named ``..._version`` or ``tei_...`` the second time."""
    item, model = {"anyOf": [_ref("ItemBody"), _ref("SeveralBody")]}, _ref("Model")
    paths = {
        "/predict": _post("predict", "Answer items of any deltas, or TEI's /predict", _items(item), _answers()),
        "/models": _get("list_models", "The deltas that answer", _list(model)),
        "/models/{delta}": _get("get_model", "About a delta", model, _UNKNOWN)
        | _post("ask_model", "Answer in HuggingFace's task shape", _ref("TaskBody"), {}),
        "/models/{delta}/info": _get("get_model_info", "About a delta", model, _UNKNOWN),
        "/models/{delta}/health": _get("get_model_health", "Readiness", _OBJECT, _UNKNOWN, _BUSY),
        "/v1/embeddings": _post(
            "create_embeddings", "Embeddings in OpenAI's shape", _ref("EmbeddingsBody"), _ref("Embeddings")
        ),
        "/v2/embed": _post(
            "embed_v2", "Embeddings by type (Cohere's shape)", _ref("EmbedBody"), _ref("TypedEmbeddings")
        ),
        **{
            f"/{version}/rerank": _post(
                f"rerank_{version}", "Rank documents (Cohere's and Jina's shape)", _ref("RerankBody"), _ref("Ranks")
            )
            for version in ("v1", "v2")
        },
        "/score": _post("score", "Score pairs (vLLM's shape)", _ref("ScoreBody"), _ref("Scores")),
        "/classify": _post("classify", "Classify (vLLM's shape)", _ref("ClassifyBody"), _ref("Classes")),
        "/v1/models/{delta}:predict": _post(
            "predict_v1", "Answer instances (KServe's first protocol)", _ref("PredictBody"), _ref("Predictions")
        ),
        "/v1/models": _get("list_models_v1", "The deltas in OpenAI's shape", _OBJECT),
        "/v1/models/{delta}": _get("get_model_v1", "A delta in OpenAI's shape", _OBJECT, _UNKNOWN),
        "/v2": _get("get_server", "About the server", _ref("ServerMetadata")),
        "/v2/health/live": _get("is_live", "Liveness", _OBJECT),
        "/v2/health/ready": _get("is_ready", "Readiness", _OBJECT, _BUSY),
        "/v2/models": _get("list_models_v2", "Names of the deltas that answer", _OBJECT),
        "/v2/models/stats": _get("list_statistics", "What each delta has done", _OBJECT),
        **_model_paths("/v2/models/{delta}", ""),
        **_model_paths("/v2/models/{delta}/versions/{version}", "_version"),
        "/v2/repository/index": _manage("list_repository", "Every version on disk or in service", "index"),
        "/v2/repository/state": _manage("set_state", "Make deltas what is wanted of them", "state"),
        "/v2/repository/models/{delta}/load": _manage("load_model", "Load a version, or swap to it", "load"),
        "/v2/repository/models/{delta}/rollback": _manage("rollback_model", "Back to the version before", "rollback"),
        "/v2/repository/models/{delta}/unload": _manage("unload_model", "Take a delta away", "unload"),
        **_tei_paths(),
        "/health": _get("get_health", "State of the server", _OBJECT),
        "/metrics": _get("get_metrics", "Prometheus metrics", None),
        "/openapi.json": _get("get_openapi", "This document", _OBJECT),
        "/": _get("get_about", "About the server", _OBJECT),
    }
    paths["/"]["get"]["responses"]["200"]["content"]["text/html"] = {}
    for path in PUBLIC:
        paths[path]["get"]["security"] = []
    for path in paths:
        if path.startswith("/v1/") and not path.endswith(":predict"):
            _in_openai_s_shape(paths[path])
    return {path: _with_parameters(path, operations) for path, operations in paths.items()}


def _model_paths(base: str, end: str) -> JsonObject:
    """The Open Inference Protocol's paths of a delta, or of one version of it."""
    infer = "Infer (Open Inference Protocol v2)"
    return {
        base: _get(f"get_metadata{end}", "Metadata of a delta", _ref("ModelMetadata"), _UNKNOWN),
        f"{base}/config": _get(f"get_config{end}", "Configuration of a delta", _OBJECT, _UNKNOWN),
        f"{base}/ready": _get(f"is_model_ready{end}", "Readiness", _OBJECT, _UNKNOWN, _BUSY),
        f"{base}/stats": _get(f"get_statistics{end}", "What a delta has done", _OBJECT, _UNKNOWN),
        f"{base}/infer": _post(f"infer{end}", infer, _ref("InferRequest"), _ref("InferResponse"), binary=True),
    }


def _tei_paths() -> JsonObject:
    """Text Embeddings Inference's routes, at the root and below a delta's name; /predict at the root is ours too."""
    posts = {
        "embed": ("Embeddings", "TeiBody", _list(_list(_NUMBER))),
        "embed_sparse": ("Weights of words", "TeiBody", _list(_list(_OBJECT))),
        "embed_all": ("An embedding a token", "TeiBody", _list(_list(_list(_NUMBER)))),
        "rerank": ("Rank texts", "TeiRerankBody", _list(_OBJECT)),
        "similarity": ("Compare texts", "TeiSimilarityBody", _list(_NUMBER)),
        "tokenize": ("Texts to tokens", "TeiTokenizeBody", _list(_list(_OBJECT))),
        "decode": ("Tokens to texts", "TeiDecodeBody", _list({"type": "string"})),
        "predict": ("Classify", "TeiBody", _list(_classes())),
    }
    paths = {}
    for base, start in (("", ""), ("/tei/{delta}", "tei_")):
        for name, (summary, body, answer) in posts.items():
            if base or name != "predict":
                paths[f"{base}/{name}"] = _post(f"{start}{name}", f"{summary} (TEI's shape)", _ref(body), answer)
        paths[f"{base}/info"] = _get(f"{start}info", "About a delta (TEI's shape)", _OBJECT, _BAD, _UNKNOWN)
    model = {"name": "model", "in": "query", "description": "Name of a delta", "schema": {"type": "string"}}
    paths["/info"]["get"]["parameters"] = [model]
    return paths


def _in_openai_s_shape(operations: JsonObject) -> None:
    """The errors under /v1 are objects."""
    for operation in operations.values():
        for code, response in operation["responses"].items():
            if code != "200":
                response["content"] = {"application/json": {"schema": _ref("OpenAIProblem")}}


def _get(name: str, summary: str, schema: JsonObject | None, *problems: str) -> JsonObject:
    content = {"text/plain": {}} if schema is None else {"application/json": {"schema": schema}}
    found = {"200": {"description": "OK", "content": content}} | {
        code: _problem(code) for code in (*problems, *_GATE, "500")
    }
    if _BUSY in problems:
        found[_BUSY] = {"description": "The server is draining.", "content": content}
    return {"get": {"operationId": name, "summary": summary, "responses": found}}


def _post(name: str, summary: str, body: JsonObject, answer: JsonObject, binary: bool = False) -> JsonObject:
    accepted, given = {"application/json": {"schema": body}}, {"application/json": {"schema": answer}}
    if binary:
        octets: JsonObject = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        accepted, given = accepted | octets, given | octets
    busy = _problem(_BUSY) | {"description": "The queue is full, or the server is stopping.", "headers": _RETRY}
    responses = {
        "200": {"description": "OK", "content": given, "headers": _CUT},
        **{code: _problem(code) for code in _ITEMS},
        _BUSY: busy,
        _LATE: _problem(_LATE),
    }
    request = {"parameters": [_TIMEOUT, _PRIORITY], "requestBody": {"required": True, "content": accepted}}
    return {"post": {"operationId": name, "summary": summary, **request, "responses": responses}}


def _manage(name: str, summary: str, what: str) -> JsonObject:
    """A route for API keys with admin rights. Its body may be empty, but for a desired state."""
    body, answer = {
        "index": (_ref("IndexRequest"), _list(_ref("Version"))),
        "state": (_ref("Desired"), _ref("Reconciled")),
    }.get(what, (_ref("LoadRequest"), _ref("Version")))
    content = {"application/json": {"schema": answer}}
    responses = {"200": {"description": "OK", "content": content}, **{code: _problem(code) for code in _ITEMS}}
    request = {"required": what == "state", "content": {"application/json": {"schema": body}}}
    about = {"operationId": name, "summary": f"{summary} (admin)", "requestBody": request, "responses": responses}
    return {"post": about}


def _problem(code: str) -> JsonObject:
    content = {"application/json": {"schema": _ref("Problem")}}
    found = {"description": _MEANINGS.get(code, ""), "content": content}
    return found | {"headers": _RETRY} if code == "429" else found


def _with_parameters(path: str, operations: JsonObject) -> JsonObject:
    names = [name for name in ("delta", "version") if f"{{{name}}}" in path]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    return {"parameters": parameters, **operations} if parameters else operations


def _answers() -> JsonObject:
    """An answer, those of several deltas, a list of either, or TEI's labels with scores."""
    ours = [_ref("Answer"), _ref("SeveralAnswers")]
    return {"anyOf": [*ours, _list({"anyOf": [*ours, *_classes()["anyOf"]]})]}


def _classes() -> JsonObject:
    """TEI's labels of one text, or of each."""
    return {"anyOf": [_ref("TeiClass"), _list(_ref("TeiClass"))]}


def _list(items: JsonObject) -> JsonObject:
    return {"type": "array", "items": items}


def _with_items(schema: Any) -> None:
    """Says of every list that it may hold anything, where it says nothing: generators of clients want to be told."""
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _with_items(value)
    if isinstance(schema, dict) and schema.get("type") == "array":
        schema.setdefault("items", {})


def _items(schema: JsonObject) -> JsonObject:
    return {"anyOf": [schema, _list(schema), _ref("TeiBody")]}


def _ref(name: str) -> JsonObject:
    return {"$ref": REF.format(name=name)}
