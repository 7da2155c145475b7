"""The id of a call, X-Request-Id: its own, or one that is made. Every answer carries it, and logs name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from secrets import token_hex

from starlette.responses import Response
from starlette.types import Scope

REQUEST_ID = "X-Request-Id"
REQUEST_ID_FIELD = REQUEST_ID.lower().encode()
NAMED = "bertology.request_id"  # in the scope: the id of the call
SANE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")  # the id of a call that is taken from its caller


def id_of(given: bytes) -> bytes:
    """The id of a call: the caller's own where that is sane, else one that is made."""
    return given if SANE.fullmatch(given) else token_hex(16).encode()


def id_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The same, of a call with these headers; the last one counts."""
    given = b""
    for name, value in headers:
        if name == REQUEST_ID_FIELD:
            given = value
    return id_of(given)


def named(response: Response, scope: Scope) -> Response:
    """The response with the id of its call."""
    response.raw_headers.append((REQUEST_ID_FIELD, scope[NAMED]))
    return response


def request_id_of(scope: Scope) -> str:
    """The id of a call, once it is in the scope."""
    found: bytes = scope[NAMED]
    return found.decode("ascii")
