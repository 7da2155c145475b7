"""The gates before every route, and around each. Default-deny: what is not listed here needs an API key, paths that do
not exist too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from secrets import token_hex
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bertology_serve.errors import BertologyError
from bertology_serve.serving.http.bodies import ACCESS
from bertology_serve.serving.http.connection import CONNECTION
from bertology_serve.serving.http.errors import error_response, problem_response
from bertology_serve.serving.http.request_id import NAMED, REQUEST_ID_FIELD, SANE, named, request_id_of
from bertology_serve.serving.keys import Access, Keyring
from bertology_serve.serving.observability import logs
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.service import ClientGone

log = logging.getLogger(__name__)
PUBLIC = frozenset({"/health", "/v2/health/live", "/v2/health/ready"})
CLIENT_GONE = 499  # nobody reads it; it tells the metrics


Endpoint = Callable[[Request], Awaitable[Response]]


class Guarded:
    """Endpoints by method, whose errors are answers and whose status is counted. ``admit`` may refuse a POST unread."""

    def __init__(self, metrics: Metrics, admit: Callable[[], None] | None = None, **endpoints: Endpoint) -> None:
        self._metrics, self._admit, self._endpoints = metrics, admit, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        try:
            if self._admit is not None and method == "POST":
                self._admit()
            response = await self._endpoints[method](Request(scope, receive))
        except BertologyError as problem:
            response = problem_response(problem, path)
        except (ClientGone, ClientDisconnect):
            response = Response(status_code=CLIENT_GONE)
        except Exception as problem:
            log.error("%s %s raised %s (request %s)", method, path, logs.place_of(problem), request_id_of(scope))
            response = problem_response(problem, path)
        response.raw_headers.append((REQUEST_ID_FIELD, scope[NAMED]))
        self._metrics.call(response.status_code)
        await response(scope, receive, send)


class Gate:
    """ASGI middleware: heads over their limit are 431, callers without a key 401, those with too many calls 429.

    What passes finds its ``Access`` by ``access_of``. It reads heads only, never a body.
    """

    def __init__(
        self, app: ASGIApp, keyring: Keyring, metrics: Metrics, max_header_bytes: int, log_calls: bool = False
    ) -> None:
        self._app, self._keyring, self._metrics, self._most = app, keyring, metrics, max_header_bytes
        self._log_calls = log_calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a call through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _noting(scope, send) if self._log_calls else send
        if self._metrics.tracing is None:
            await self._judge(scope, receive, send)
            return
        with self._metrics.tracing.call(scope) as span:
            await self._judge(scope, receive, _traced(span, send))

    async def _judge(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rights, rates and sizes, before anything else."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"])
        given = b""
        for name, value in headers:
            size += len(name) + len(value)
            if name == REQUEST_ID_FIELD:
                given = value
        scope[NAMED] = given if SANE.fullmatch(given) else token_hex(16).encode()  # as ``id_of`` does
        try:
            if scope["path"] not in PUBLIC and not wants_page(scope):
                scope[ACCESS] = access = self._keyring.find(headers)
                if CONNECTION in scope:
                    scope[CONNECTION].known = True
                access.call()
        except BertologyError as problem:
            refusal = problem_response(problem, scope["path"])
        else:
            if size <= self._most:
                try:
                    await self._app(scope, receive, send)
                    return
                except HTTPException as problem:
                    refusal = _unrouted(scope, problem)
            else:
                message = f"the path and headers hold {size} bytes; at most {self._most} are taken"
                refusal = error_response(message, 431, scope["path"])
        self._metrics.call(refusal.status_code)
        await named(refusal, scope)(scope, receive, send)


def wants_page(scope: Scope) -> bool:
    """Whether a browser asks for the page at ``/``: the same bytes for everybody, so it needs no key."""
    accepted = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return scope["path"] == "/" and scope["method"] in ("GET", "HEAD") and accepted.lstrip().startswith(b"text/html")


def _unrouted(scope: Scope, problem: HTTPException) -> Response:
    """404 for unknown paths and 405 for other methods."""
    known = {404: "no such path; GET /openapi.json lists them", 405: f"{scope['method']} is not for this path"}
    message = known.get(problem.status_code, problem.detail)
    return error_response(message, problem.status_code, scope["path"], problem.headers)


def _traced(span: Any, send: Send) -> Send:
    async def traced(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set_attribute("http.response.status_code", message["status"])
        await send(message)

    return traced


def _noting(scope: Scope, send: Send) -> Send:
    """Logs a call as its answer begins. The path is logged as it was sent: escaped, so that no line breaks in it."""
    started = time.perf_counter()

    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            access: Access | None = scope.get(ACCESS)
            name, path = access.name if access else "", scope["raw_path"].decode("ascii", "replace")
            seconds = time.perf_counter() - started
            logs.call(log, scope["method"], path, message["status"], seconds, name, request_id_of(scope))
        await send(message)

    return noting
