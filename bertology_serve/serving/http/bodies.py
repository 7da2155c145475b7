"""Bodies in and answers out, with their limits. No Content-Type is needed."""

from __future__ import annotations

import asyncio
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipResponder, IdentityResponder
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bertology_serve.encoder.delta_set import Prediction
from bertology_serve.errors import DataError, LimitError, SlowBody
from bertology_serve.serving.batching.scheduler import CallContext
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.connection import CONNECTION, WHOLE, Connection
from bertology_serve.serving.http.errors import JSON
from bertology_serve.serving.keys import Access

BINARY = "application/octet-stream"
JSON_LENGTH = "Inference-Header-Content-Length"
TIMEOUT, PRIORITY = "X-Request-Timeout-Ms", "X-Request-Priority"
TRUNCATED = "X-Truncated"
ACCESS = "bertology.access"  # in the scope: who calls
_WINDOW = {"gzip": 31, "deflate": 15}  # zlib's wbits
_PIECE = 4096  # bytes that are decompressed at once, and at most without a thread for it
MOST_MEMBERS = 1024  # of one gzip body
LEVEL = 1  # zlib's for answers: the quickest
_WEIGHT = re.compile(r"\s*q=([01](?:\.\d{0,3})?)\s*")


def answer_response(
    content: bytes, predictions: Sequence[Prediction], kind: str = JSON, headers: Mapping[str, str] | None = None
) -> Response:
    """An encoded answer; X-Truncated says how many of its items were cut, in whatever shape they are answered."""
    cut = sum(prediction.truncated for prediction in predictions)
    return Response(content, headers={**(headers or {}), **({TRUNCATED: str(cut)} if cut else {})}, media_type=kind)


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The whole body, decompressed; LimitError beyond the configured size, as soon as that is known.

    SlowBody where it is not there after so many seconds.
    """
    most, seconds = config.limits.max_body_bytes, config.limits.max_body_seconds
    announced = _header(request, b"content-length")
    if announced and announced.isdigit() and int(announced[:18]) > most:
        raise _too_large(most)
    if WHOLE in request.scope:  # what is there already needs no clock
        body = await _read(request, most)
    else:
        try:
            async with asyncio.timeout(seconds):
                body = await _read(request, most)
        except TimeoutError:
            raise SlowBody(f"the body was not there after {seconds:g} s; send it faster, or less in one call") from None
    encoding = (_header(request, b"content-encoding") or b"").decode("latin-1").strip().lower()
    if encoding in ("", "identity"):
        return body
    if len(body) > _PIECE:
        return await asyncio.to_thread(_decompressed, body, encoding, most)
    return _decompressed(body, encoding, most)


async def _read(request: Request, most: int) -> bytes:
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _header(request: Request, name: bytes) -> bytes | None:
    """The first header of that name, in lower case, as it was sent."""
    for known, value in request.scope["headers"]:
        if known == name:
            found: bytes = value
            return found
    return None


def header_length(request: Request) -> int | None:
    """The length of the JSON part of a body with binary tensors, ``None`` for JSON alone."""
    return _number(request, JSON_LENGTH, 18, "a number of bytes")


def _number(request: Request, name: str, digits: int, expected: str, least: int = 0) -> int | None:
    """The whole number in a header; None where there is none, DataError where it is something else."""
    value = _header(request, name.lower().encode())
    if value is None:
        return None
    if not value.isdigit() or len(value) > digits or int(value) < least:
        raise DataError(f"header {name} is {value[:40].decode('latin-1')!r}; expected {expected}")
    return int(value)


def access_of(scope: Scope) -> Access:
    """Who calls. For routes behind the gate that are not public."""
    access: Access = scope[ACCESS]
    return access


async def receive(request: Request, config: ServerConfig) -> tuple[bytes, CallContext]:
    """The body of a request for answers, and the call that it makes: who asks, the seconds that the caller allows, by
    X-Request-Timeout-Ms, its priority, by X-Request-Priority, and what notices that it has hung up.
    """
    body = await read_body(request, config)
    milliseconds = _number(request, TIMEOUT, 10, "a whole number of milliseconds above 0", least=1)
    seconds = math.inf if milliseconds is None else milliseconds / 1000
    priority = _number(request, PRIORITY, 9, "a whole number, 1 goes first") or 0
    connection: Connection | None = request.scope.get(CONNECTION)
    watch = partial(_watched, request) if connection is None else connection.watch
    return body, CallContext(request.scope[ACCESS], watch, seconds, priority)


def _watched(request: Request, left: Callable[[], None]) -> Callable[[], object]:
    """Calls ``left`` once the client has hung up, under another server; what ends the watch."""

    async def disconnected() -> None:
        with suppress(ClientDisconnect):
            while (await request.receive())["type"] != "http.disconnect":
                await asyncio.sleep(0)
        left()

    return asyncio.ensure_future(disconnected()).cancel


def _decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """All members of a gzip body, one after the other, or the one of a deflate body."""
    if encoding not in _WINDOW:
        raise DataError(f"Content-Encoding {encoding[:40]!r} is not supported; expected gzip, deflate or none")
    found, at = bytearray(), 0
    for _ in range(MOST_MEMBERS):
        reader = zlib.decompressobj(_WINDOW[encoding])
        while not reader.eof:
            piece = body[at : at + _PIECE]
            if not piece:
                raise DataError(f"the {encoding} body is cut short")
            try:
                found += reader.decompress(piece, most + 1 - len(found))
            except zlib.error:
                raise DataError(f"the body is not valid {encoding}") from None
            if len(found) > most:
                raise _too_large(most)
            at += len(piece) - len(reader.unused_data)
        if at == len(body) or (body[at] == 0 and not body[at:].strip(b"\0")):  # gzip files may be padded with zeros
            return bytes(found)
        if encoding != "gzip":
            raise DataError(f"the {encoding} body goes on after its end")
    raise LimitError(f"the gzip body has more than {MOST_MEMBERS} members; compress it as one")


def _too_large(most: int) -> LimitError:
    return LimitError(f"the body is larger than {most} bytes; send less in one call")


class Compression:
    """ASGI middleware: answers of at least so many bytes are compressed. All of those say that they vary.

    Starlette's own looks for the word ``gzip`` alone, which stands in ``gzip;q=0`` too.
    """

    def __init__(self, app: ASGIApp, least: int) -> None:
        self._app, self._least = app, least

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif takes_gzip(",".join(Headers(scope=scope).getlist("accept-encoding"))):
            await GZipResponder(self._app, self._least, LEVEL)(scope, receive, send)
        else:
            await IdentityResponder(self._app, self._least)(scope, receive, send)


def takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding takes gzip, no less than plain bytes (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for part in accepted.lower().split(","):
        coding, parameter, weight = part.partition(";")
        found = _WEIGHT.fullmatch(weight)
        weights[coding.strip()] = 1.0 if not parameter else float(found[1]) if found else 0.0
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)
