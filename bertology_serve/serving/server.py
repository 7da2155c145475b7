"""The server process: a bound socket, uvicorn around the application, and the way it stops.

SIGTERM, SIGINT or SIGHUP: readiness answers 503 at once, calls are still taken for ``drain_seconds`` (so that load
balancers can notice), then the socket closes and what was accepted is answered. A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from bertology_serve.errors import InputError
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.bodies import JSON_LENGTH, PRIORITY, REQUEST_ID, TIMEOUT
from bertology_serve.serving.http.connection import limited
from bertology_serve.serving.http.gate import Gate
from bertology_serve.serving.http.routes import Routes
from bertology_serve.serving.keys import Keyring
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.logs import Tracing
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.service import DRAINING, Service
from bertology_serve.serving.versions.delta_cache import TierGauges
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.watcher import Reconciler, Watcher

if TYPE_CHECKING:
    from bertology_serve.serving.grpc_server import GrpcServer


log = logging.getLogger(__name__)
READ_SECONDS = 0.1  # for the calls of connections that had just been taken, before those that rest are closed
BACKLOG, AT_ONCE = 2048, 16  # connections that may wait to be accepted; that asyncio accepts before it tells of any
STATE_SECONDS = 1.0  # how often the desired-state file is looked at
SLOTS = 10_000  # deltas that fit, as far as routers are told: memory is the bound
# What web pages may send and read beyond what browsers always allow
SENT_HEADERS = ("Authorization", "X-API-Key", "Content-Type", REQUEST_ID, TIMEOUT, PRIORITY, JSON_LENGTH, "traceparent")
TOLD_HEADERS = (REQUEST_ID, "Retry-After", JSON_LENGTH)
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
KEEP_ALIVE = 75  # seconds: longer than load balancers keep an idle connection, so that it is they who end it


class Application(Starlette):
    """Starlette with ``layers`` in the place of its own.

    Those turn what is raised into pages; here ``Guarded`` and the gate do, which costs less.
    """

    def __init__(self, routes: list[Route], layers: Callable[[ASGIApp], ASGIApp], lifespan: Lifespan) -> None:
        super().__init__(routes=routes, lifespan=lifespan)
        self.router.redirect_slashes = False
        self._layers = layers

    def build_middleware_stack(self) -> ASGIApp:
        return self._layers(self.router)


def make_app(service: Service, keyring: Keyring, rpc: GrpcServer | None = None) -> Starlette:
    """The application around a service, which it starts and stops, and a gRPC port beside it."""
    registry, metrics, config, lifecycle = service.registry, service.metrics, service.config, service.lifecycle

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await _follow(service)
        service.start()
        if rpc:
            await rpc.start(service, keyring)
        yield
        await service.background.close()
        if rpc:
            await rpc.stop(config.stopping.shutdown_seconds)
        if not await service.stop():
            log.error("stopped with %d items unanswered", service.queue.items)

    def layers(app: ASGIApp) -> ASGIApp:
        """The gate, and around it what was switched on. Browsers ask before they send keys, so CORS comes first."""
        app = Gate(app, keyring, metrics, config.limits.max_header_bytes, config.logging.log_calls)
        if config.listen.gzip_bytes:
            app = GZipMiddleware(app, minimum_size=config.listen.gzip_bytes, compresslevel=1)
        if config.listen.cors_origin:
            app = CORSMiddleware(
                app, config.listen.cors_origin, ("GET", "POST"), SENT_HEADERS, expose_headers=TOLD_HEADERS
            )
        return app

    metrics.deltas(len(registry.all()))
    metrics.affinity(registry.resident, lambda: [*service.queue.waiting(), *lifecycle.loading()], SLOTS)
    metrics.registry.register(TierGauges(registry.tiers))
    return Application(Routes(service).table(), layers, lifespan)


async def _follow(service: Service) -> None:
    """From now on the desired-state file is followed or else, where that is asked for, the directory of deltas.

    The file is obeyed once before anything answers.
    """
    config, lifecycle = service.config, service.lifecycle
    if config.deltas.state_file is not None:
        reconciler = Reconciler(
            config.deltas.state_file, lifecycle, service.queue, config.deltas.watch_seconds or STATE_SECONDS
        )
        await reconciler.look()
        service.background.loop("reconciler", reconciler.run)
    elif config.deltas.watch_seconds:
        service.background.loop("watcher", Watcher(lifecycle, config.deltas.watch_seconds).run)


class Server(uvicorn.Server):
    """One service behind HTTP. ``announce`` is called once it answers."""

    def __init__(
        self,
        registry: Registry,
        config: ServerConfig,
        announce: Callable[[], None] = lambda: None,
        keyring: Keyring | None = None,
        background: Background | None = None,
    ) -> None:
        metrics = Metrics(config.logging.max_metric_deltas)
        metrics.tracing = Tracing() if config.logging.traces else None
        self._announce = announce
        self.service = Service(registry, config, metrics, background)
        self._drain_seconds = config.stopping.drain_seconds
        self._protocol = limited(
            config.limits.max_header_bytes,
            config.limits.max_body_bytes,
            config.limits.max_body_seconds,
            KEEP_ALIVE,
            config.listen.max_connections,
        )
        self.rpc: GrpcServer | None = None
        if config.listen.grpc_port is not None:
            from bertology_serve.serving.grpc_server import GrpcServer  # not for who serves HTTP alone

            self.rpc = GrpcServer(config.listen.host, config.listen.grpc_port)
        super().__init__(
            uvicorn.Config(
                make_app(self.service, keyring or Keyring(), self.rpc),
                http=self._protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here asks where a call came from
                lifespan="on",
                backlog=AT_ONCE,
                timeout_graceful_shutdown=max(1, round(config.stopping.shutdown_seconds)),
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, and SIGHUP (the terminal has gone) like SIGTERM, unless it is ignored (nohup)."""
        with super().capture_signals():
            mine = threading.current_thread() is threading.main_thread()
            if not mine or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before or signal.SIG_DFL)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain; second: close the socket now; third: do not even answer what was accepted."""
        if self.service.state == DRAINING:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        log.info("%s: not ready any more, stopping in %g s", signal.Signals(sig).name, self._drain_seconds)
        self.drain()

    def drain(self) -> None:
        """Readiness turns false now, the socket closes after the configured time. For signal handlers and threads."""
        self.service.drain()
        self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_seconds, self._exit)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)
        crowd = self._protocol.crowd
        crowd.most = room_for(crowd.most)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections. Those that the system has taken already are read first, and answered."""
        waiting = [connection for listening in sockets or [] for connection in _taken(listening)]
        for server in self.servers:
            server.close()
        for connection in waiting:
            await self._loop.connect_accepted_socket(self._connection, connection)
        await asyncio.sleep(READ_SECONDS)
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        """The protocol of one connection, as uvicorn makes it."""
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self._loop
        )
        return made

    def _exit(self) -> None:
        self.should_exit = True


def _taken(listening: socket.socket) -> Iterator[socket.socket]:
    """The connections of a listening socket that nobody has accepted yet; closing it would reset them."""
    listening.setblocking(False)
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:  # none is left
            return
        connection.setblocking(False)
        yield connection


KEPT = 48  # descriptors for all else: files that are read, executors that are started again
LEAST = 8  # connections, however few descriptors there are


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening; InputError where it cannot be had.

    Made before anything is loaded, so that a port that is taken is known at once.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as problem:
        taken = problem.errno == errno.EADDRINUSE
        raise InputError(
            f"port {port} of {host} is taken; stop what listens there or choose another --port"
            if taken
            else f"cannot listen on {host}:{port}: {problem.strerror or problem}; choose another --host"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, for people."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def room_for(connections: int) -> int:
    """How many of so many connections the system allows beside what is open now; the soft limit is raised for them."""
    try:
        import resource

        open_now = len(os.listdir("/proc/self/fd") if Path("/proc/self/fd").is_dir() else os.listdir("/dev/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = open_now + KEPT + connections
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    except (ImportError, OSError, ValueError):  # no such limits here, or none that may be seen
        return connections
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    room = max(soft - open_now - KEPT, LEAST)
    log.warning("room for %d connections, not %d: the system allows %d open files (ulimit -n)", room, connections, soft)
    return room
