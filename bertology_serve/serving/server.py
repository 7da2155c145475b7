"""The application around a service, and the server process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from bertology_serve.errors import Unsupported
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.bodies import JSON_LENGTH, PRIORITY, TIMEOUT, TRUNCATED, Compression
from bertology_serve.serving.http.connection import limited
from bertology_serve.serving.http.gate import Gate
from bertology_serve.serving.http.listening import DrainingServer
from bertology_serve.serving.http.request_id import REQUEST_ID
from bertology_serve.serving.http.routes import Routes
from bertology_serve.serving.keys import Keyring
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.logs import Tracing
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.service import Service
from bertology_serve.serving.versions.delta_cache import TierGauges
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.watcher import Watcher

if TYPE_CHECKING:
    from bertology_serve.serving.grpc_port import GrpcServer

log = logging.getLogger(__name__)
SLOTS = 10_000  # deltas that fit, as far as routers are told: memory is the bound
# What web pages may send and read beyond what browsers always allow
SENT_HEADERS = ("Authorization", "X-API-Key", "Content-Type", REQUEST_ID, TIMEOUT, PRIORITY, JSON_LENGTH, "traceparent")
TOLD_HEADERS = (REQUEST_ID, TRUNCATED, "Retry-After", JSON_LENGTH)
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
        """The layers around the routes."""
        return self._layers(self.router)


def make_app(service: Service, keyring: Keyring, rpc: GrpcServer | None = None) -> Starlette:
    """The application around a service, which it starts and stops, and a gRPC port beside it."""
    registry, metrics, config, lifecycle = service.registry, service.metrics, service.config, service.lifecycle

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await _follow(service)
        service.start()
        if rpc:
            await rpc.start()
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
            app = Compression(app, config.listen.gzip_bytes)
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
        await service.reconciler.look()
        service.background.loop("reconciler", service.reconciler.run)
    elif config.deltas.watch_seconds:
        service.background.loop("watcher", Watcher(lifecycle, config.deltas.watch_seconds).run)


class Server(DrainingServer):
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
        self.service = Service(registry, config, metrics, background)
        keyring, limits = keyring or Keyring(), config.limits
        self.rpc: GrpcServer | None = None
        if config.listen.grpc_port is not None:
            try:  # not for who serves HTTP alone
                from bertology_serve.serving.grpc_port import GrpcServer
                from bertology_serve.serving.grpc_server import Methods
            except ImportError:
                raise Unsupported(
                    "--grpc-port needs grpcio and protobuf: pip install 'bertology-serve[grpc]'"
                ) from None
            handlers = (Methods(self.service, keyring).handler(),)
            self.rpc = GrpcServer(config.listen.host, config.listen.grpc_port, handlers, limits)
        app = make_app(self.service, keyring, self.rpc)
        protocol = limited(
            limits.max_header_bytes,
            limits.max_body_bytes,
            limits.max_body_seconds,
            KEEP_ALIVE,
            config.listen.max_connections,
        )
        super().__init__(app, protocol, config.stopping, self.service.drain, announce)
