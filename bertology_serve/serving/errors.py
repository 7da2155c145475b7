"""Errors as HTTP answers."""

from __future__ import annotations

import math
from http import HTTPStatus

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
