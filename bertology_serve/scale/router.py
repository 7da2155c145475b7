"""The router: calls of every protocol go to the replica where their delta lives, and come back as they are.

A call is sent again, to another replica, only where none has begun to answer it: where there was no connection, where
the connection ended before the first byte of an answer (once: what ends a replica should not end them all), and where a
replica had no room (once, if another has). Deadlines, priorities and keys are passed on; the replicas judge them. What
changes deltas goes to all replicas, see ``replicas``. gRPC is not routed.

aiohttp asks the replicas: of the kept HTTP clients it costs the least, 80 µs a call where httpx
takes 900 (AMD EPYC, one core).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
from multidict import CIMultiDict
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from bertology_serve.errors import (
    BertologyError,
    Crashed,
    Expired,
    LimitError,
    Overloaded,
    SlowBody,
    Unauthorized,
    Unsupported,
)
from bertology_serve.scale.calls import CHANGE, SERVED_BY, STATE, delta_of, tokens_of
from bertology_serve.scale.config import RouterConfig
from bertology_serve.scale.placement import Placement, ReplicaState
from bertology_serve.scale.replicas import Replicas, Reply
from bertology_serve.scale.router_metrics import RouterMetrics
from bertology_serve.serving.http.connection import CONNECTION, WHOLE, limited
from bertology_serve.serving.http.errors import json_response, problem_response
from bertology_serve.serving.http.listening import DrainingServer, bind, url_of
from bertology_serve.serving.http.request_id import NAMED, REQUEST_ID, id_in, named, request_id_of
from bertology_serve.serving.observability import logs
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.logs import place_of
from bertology_serve.serving.versions.desired import read_desired

if TYPE_CHECKING:
    from bertology_serve.serving.grpc_port import GrpcServer

log = logging.getLogger(__name__)
Headers = list[tuple[bytes, bytes]]
TIMEOUT = b"x-request-timeout-ms"
WHOLE_BYTES = 2**18  # of an answer that is passed on in one piece; longer ones as they come
# what is between two hosts only (RFC 9110, 7.6.1), and what aiohttp says itself
_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect",
})  # fmt: skip


class CutOff(Exception):
    """An answer of which the caller has a part ends here: the connection does too, so that the caller sees it."""


class ForwardedCall(NamedTuple):
    """A call on its way."""

    method: str
    target: str  # raw path and query
    headers: CIMultiDict[str]
    body: bytes
    delta: str | None
    tokens: float
    started: float


class Router:
    """The ASGI application. ``key`` is the replicas' API key, see ``Replicas``; with one, /metrics wants it too."""

    def __init__(self, config: RouterConfig, key: str = "") -> None:
        self._config, self._key = config, key
        self.placement, self.background = Placement(), Background()
        self.metrics = RouterMetrics(self.placement)
        self.draining = False
        self._own: dict[tuple[str, str], Callable[[Scope], Response]] = {
            ("GET", "/health"): self._health,
            ("GET", "/v2/health/live"): self._is_live,
            ("GET", "/v2/health/ready"): self._is_ready,
            ("GET", "/metrics"): self._metrics,
        }
        self.replicas: Replicas
        self._session: aiohttp.ClientSession
        self.picker = self._make_picker()

    def _make_picker(self) -> GrpcServer | None:
        """The port for Envoy, not yet open. Unsupported without its packages."""
        listen, limits = self._config.listen, self._config.limits
        if listen.ext_proc_port is None:
            return None
        try:
            from bertology_serve.scale.endpoint_picker import EndpointPicker
            from bertology_serve.serving.grpc_port import GrpcServer
        except ImportError:
            raise Unsupported(
                "--ext-proc-port needs grpcio and protobuf: pip install 'bertology-serve[envoy]'"
            ) from None
        picker = EndpointPicker(self.placement, self.metrics, limits.max_body_bytes, lambda: self.is_ready)
        return GrpcServer(listen.host, listen.ext_proc_port, picker.handlers(), limits)

    @property
    def is_ready(self) -> bool:
        """Whether it should be sent calls."""
        return not self.draining and bool(self.replicas.ready)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Opens and closes what it needs to send calls."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0)  # less than the replicas' own 75 s
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=self._config.listen.max_call_seconds),
            max_field_size=self._config.limits.max_header_bytes,
        ) as self._session:
            self.replicas = Replicas(self._config.replicas, self.placement, self._session, self._key)
            await asyncio.gather(*(self.replicas.look_at(one) for one in self.replicas.known()))
            if self.picker:
                await self.picker.start()
            self.background.loop("replicas", self.replicas.run)
            yield
            if self.picker:
                await self.picker.stop(self._config.stopping.shutdown_seconds)
            await self.background.close()

    def drain(self) -> None:
        """Readiness answers 503 from now on; calls are still taken."""
        self.draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        path: str = scope["path"]
        scope[NAMED] = id_in(scope["headers"])
        own = self._own.get((scope["method"], path))
        try:
            if own is not None:
                response = own(scope)
            elif scope["method"] == "POST" and (path == STATE or CHANGE.fullmatch(path)):
                response = await self._change(scope, receive)
            else:
                await self._forward(scope, receive, send)
                return
        except (BertologyError, aiohttp.ClientError, TimeoutError) as problem:
            response = problem_response(_as_ours(problem), path)
        except CutOff:
            raise
        except Exception as problem:
            log.error("%s %s raised %s (request %s)", scope["method"], path, place_of(problem), request_id_of(scope))
            response = problem_response(problem, path)
        self.metrics.call("", response.status_code)
        await named(response, scope)(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.lifespan():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive)
        if body is None:
            return
        delta, tokens = delta_of(scope["path"], body), tokens_of(len(body))
        query: bytes = scope["query_string"]
        target = (scope["raw_path"] + (b"?" + query if query else b"")).decode("ascii")  # else it was refused
        headers = CIMultiDict((_text(name), _text(value)) for name, value in scope["headers"] if name not in _HOP)
        call = ForwardedCall(scope["method"], target, headers, body, delta, tokens, time.monotonic())
        self.placement.count(delta, tokens, call.started)
        if connection := scope.get(CONNECTION):
            task = asyncio.current_task()
            assert task is not None
            connection.watch(task.cancel)
        await self._tried(call, send)

    async def _tried(self, call: ForwardedCall, send: Send) -> None:
        """Sends a call to one replica after the other until one has begun to answer."""
        tried, refused, ended = list[str](), None, False
        while True:
            state = self.placement.begin(call.delta, call.tokens, tried)
            if state is None:
                break
            tried.append(state.name)
            self.metrics.met(state, call.delta)
            begun = False
            try:
                async with self._session.request(
                    call.method,
                    _url(state.name, call.target),
                    data=call.body or None,
                    headers=self._left(call),
                    allow_redirects=False,
                ) as reply:
                    if reply.status == 503 and refused is None:
                        refused = state, reply.status, _passed(reply.raw_headers, state), await reply.read()
                        self.metrics.again("no room")
                        continue
                    begun = True
                    await self._pass_on(state, reply, send)
                    return
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                self.replicas.lost(state)
                self.metrics.again("no connection")
            except (aiohttp.ClientError, TimeoutError) as problem:
                if begun or isinstance(problem, TimeoutError):
                    raise  # the caller was told something, or nobody knows
                if ended:
                    break
                ended = True
                self.metrics.again("connection ended")
            finally:
                self.placement.end(state, call.tokens)
        if refused is not None:
            state, status, headers, content = refused
            await self._whole(state, status, headers, content, send)
            return
        if ended:
            raise Crashed("two replicas ended while they had this call; try again in 1 s", 1.0)
        raise Overloaded("no replica takes calls for this now; try again in 1 s", 1.0)

    def _left(self, call: ForwardedCall) -> CIMultiDict[str]:
        """The headers of a call, with what is left of the time that it has."""
        asked = call.headers.get(TIMEOUT.decode())
        if asked is None or not asked.isdigit() or len(asked) > 10:
            return call.headers
        left = int(asked) - int(1000 * (time.monotonic() - call.started))
        if left <= 0 < int(asked):
            raise Expired("no answer within the time of the call; send less, later, or allow more time")
        changed = call.headers.copy()
        changed[TIMEOUT.decode()] = str(left)
        return changed

    async def _pass_on(self, state: ReplicaState, reply: aiohttp.ClientResponse, send: Send) -> None:
        """An answer as it comes: whole where it is short, so that it goes in one packet."""
        headers = _passed(reply.raw_headers, state)
        length = reply.content_length
        if length is not None and length <= WHOLE_BYTES:
            await self._whole(state, reply.status, headers, await reply.read(), send)
            return
        self.metrics.call(state.name, reply.status)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        try:
            async for piece in reply.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, TimeoutError) as problem:
            raise CutOff(f"{state.name} ended in the middle of an answer") from problem
        await send({"type": "http.response.body", "body": b""})

    async def _whole(self, state: ReplicaState, status: int, headers: Headers, body: bytes, send: Send) -> None:
        self.metrics.call(state.name, status)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body of a call, ``None`` where the caller has gone. LimitError, SlowBody."""
        if WHOLE in scope:  # what is there already needs no clock
            return await self._read(receive)
        try:
            async with asyncio.timeout(self._config.limits.max_body_seconds):
                return await self._read(receive)
        except TimeoutError:
            raise SlowBody("the body was not there in time; send it faster, or less in one call") from None

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size, most = list[bytes](), 0, self._config.limits.max_body_bytes
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message["body"])
            if size > most:
                raise LimitError(f"the body is larger than {most} bytes; send less in one call")
            parts.append(message["body"])
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _change(self, scope: Scope, receive: Receive) -> Response:
        """What loads, unloads and the like does so on every replica, with the caller's own rights."""
        body = await self._body(scope, receive) or b""
        headers = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"authorization", b"x-api-key")
        } | {REQUEST_ID: request_id_of(scope)}
        if found := CHANGE.fullmatch(scope["path"]):
            name, what = found[1], found[2]
            how: Callable[..., Awaitable[Reply]] = getattr(self.replicas, what)
            reply = await how(name, body, headers)
        else:
            reply = await self.replicas.obey(body, headers)
        kept = {
            name: value for name, value in reply.headers.items() if name.lower() in ("retry-after", "www-authenticate")
        }
        return Response(reply.body, reply.status, kept, "application/json")

    def _health(self, scope: Scope) -> Response:
        return json_response({"status": "draining" if self.draining else "ready" if self.replicas.ready else "waiting"})

    def _is_live(self, scope: Scope) -> Response:
        return json_response({"live": True})

    def _is_ready(self, scope: Scope) -> Response:
        return json_response({"ready": self.is_ready}, 200 if self.is_ready else 503)

    def _metrics(self, scope: Scope) -> Response:
        if self._key:
            wanted = self._key.encode()
            given = [
                value.removeprefix(b"Bearer ")
                for name, value in scope["headers"]
                if name in (b"authorization", b"x-api-key")
            ]
            if not any(hmac.compare_digest(one, wanted) for one in given):
                return problem_response(Unauthorized("the metrics name deltas; show the router's own key"), "/metrics")
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _text(value: bytes) -> str:
    """A header as aiohttp, which writes UTF-8, writes it again."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


@lru_cache(maxsize=4096)
def _url(replica: str, target: str) -> URL:
    return URL(replica + target, encoded=True)


def _passed(raw: tuple[tuple[bytes, bytes], ...], state: ReplicaState) -> Headers:
    """The headers of an answer, in lower case, and who gave it."""
    lower = [(name.lower(), value) for name, value in raw]
    kept = [one for one in lower if one[0] == b"content-length" or one[0] not in _HOP | {b"date"}]  # each says its own
    return [*kept, (SERVED_BY, state.name.encode())]


def _as_ours(problem: Exception) -> Exception:
    """What went wrong towards a replica, as one of the errors that callers know."""
    if isinstance(problem, TimeoutError):
        return Expired("no replica answered in time; it may have been computed, so send it again with care")
    if isinstance(problem, aiohttp.ClientError):
        return Crashed("the replica ended while it answered; try again in 1 s", 1.0)
    return problem


def route(config: RouterConfig, key: str = "", say: Callable[[str], None] = print) -> None:
    """Routes until SIGTERM or SIGINT; calls under way are answered first. ``say`` is told the address.

    Logs and signal handlers of the process are set, so call it from the main thread. Raises InputError where the port
    is taken, NotFound and SpecError for files that cannot be used.
    """
    logs.set_up(config.logging.log_level, config.logging.log_format)
    replicas, state_file = config.replicas.addresses(), config.replicas.state_file
    if state_file is not None and state_file.exists():
        read_desired(state_file)
    router, limits, listen = Router(config, key), config.limits, config.listen
    protocol = limited(
        limits.max_header_bytes, limits.max_body_bytes, limits.max_body_seconds, most=listen.max_connections
    )
    with bind(listen.host, listen.port) as bound:
        if listen.ext_proc_port:
            bind(listen.host, listen.ext_proc_port, "--ext-proc-port").close()  # gRPC takes no open socket
        url = url_of(bound)

        def announce() -> None:
            say(f"{len(router.replicas.ready)} of {len(replicas)} replicas ready: {url}")

        DrainingServer(router, protocol, config.stopping, router.drain, announce).run(sockets=[bound])
