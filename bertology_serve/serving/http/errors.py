"""Errors as answers: their status and what the caller is told, in the shape of the path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from bertology_serve.errors import (
    BertologyError,
    Expired,
    Forbidden,
    InputError,
    LimitError,
    NotFound,
    Overloaded,
    RateLimited,
    SlowBody,
    Unauthorized,
    Unsupported,
    VerificationError,
)
from bertology_serve.serving.protocol.json_codec import encode

JSON = "application/json"


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(encode(value), status, headers, JSON)


def problem_response(problem: Exception, path: str) -> Response:
    """An error with its status, in the shape of the path."""
    return error_response(message_of(problem), status_of(problem), path, headers_of(problem))


def error_response(message: str, status: int, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """``{"error": message}``; under ``/v1`` an object, as OpenAI's client reads it, but for KServe's ``:predict``."""
    error: Any = message
    if path.startswith("/v1/") and not path.endswith(":predict"):
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": None}
    return json_response({"error": error}, status, headers)


_STATUS: tuple[tuple[type[BertologyError], HTTPStatus], ...] = (
    (LimitError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (SlowBody, HTTPStatus.REQUEST_TIMEOUT),
    (InputError, HTTPStatus.BAD_REQUEST),
    (NotFound, HTTPStatus.NOT_FOUND),
    (Unsupported, HTTPStatus.BAD_REQUEST),
    (Unauthorized, HTTPStatus.UNAUTHORIZED),
    (Forbidden, HTTPStatus.FORBIDDEN),
    (RateLimited, HTTPStatus.TOO_MANY_REQUESTS),
    (Overloaded, HTTPStatus.SERVICE_UNAVAILABLE),
    (Expired, HTTPStatus.GATEWAY_TIMEOUT),
    (VerificationError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
UNEXPECTED = "the server failed on this call; the fault is in its log"


def status_of(problem: Exception) -> HTTPStatus:
    """The status of an error, by its place in the tree of ``errors``; 500 for what nobody raised on purpose."""
    for kind, status in _STATUS:
        if isinstance(problem, kind):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR


def message_of(problem: Exception) -> str:
    """What the caller is told: the message of errors raised on purpose, nothing of others."""
    return " ".join(str(problem).split()) if isinstance(problem, BertologyError) else UNEXPECTED


def headers_of(problem: Exception) -> dict[str, str]:
    """Retry-After in whole seconds where trying again makes sense; how to show a key where none was shown."""
    if isinstance(problem, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(problem, SlowBody):
        return {"Connection": "close"}  # the rest of the body would be read as the next call
    return {"Retry-After": str(math.ceil(problem.retry_after))} if isinstance(problem, Overloaded) else {}
