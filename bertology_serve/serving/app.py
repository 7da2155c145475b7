"""The HTTP application: routes, and errors as answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bertology_serve.errors import BertologyError
from bertology_serve.serving.answering import Answering
from bertology_serve.serving.execution.engine import ClientGone, Engine
from bertology_serve.serving.http.bodies import JSON_LENGTH, PRIORITY, REQUEST_ID, TIMEOUT, problem_response
from bertology_serve.serving.http.gate import Gate, named, request_id_of
from bertology_serve.serving.http.routes import Handlers, Management
from bertology_serve.serving.keys import Keyring
from bertology_serve.serving.observability.logs import place_of
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.rpc.grpc_server import GrpcServer
from bertology_serve.serving.versions.delta_cache import TierGauges
from bertology_serve.serving.versions.lifecycle import Lifecycle
from bertology_serve.serving.versions.watcher import Reconciler, Watcher

log = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
STATE_SECONDS = 1.0  # how often the desired-state file is looked at
SLOTS = 10_000  # deltas that fit, as far as routers are told: memory is the bound
# What web pages may send and read beyond what browsers always allow
SENT_HEADERS = ("Authorization", "X-API-Key", "Content-Type", REQUEST_ID, TIMEOUT, PRIORITY, JSON_LENGTH, "traceparent")
TOLD_HEADERS = (REQUEST_ID, "Retry-After", JSON_LENGTH)
CLIENT_GONE = 499  # nobody reads it; it tells the metrics


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


def make_app(answering: Answering, metrics: Metrics, keyring: Keyring, rpc: GrpcServer | None = None) -> Starlette:
    """The application around an engine, which it starts and stops, and a gRPC port beside it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await _follow(engine, lifecycle)
        engine.start()
        if rpc:
            await rpc.start(answering, lifecycle, metrics, keyring)
        yield
        await engine.background.close()
        if rpc:
            await rpc.stop(engine.config.shutdown_seconds)
        lifecycle.close()
        cold.close()
        if not await engine.stop():
            log.error("stopped with %d items unanswered", engine.queue.items)

    engine, registry, cold = answering.engine, answering.registry, answering.cold
    metrics.deltas(len(registry.all()))
    metrics.affinity(registry.resident, lambda: [*engine.queue.waiting(), *cold.names()], SLOTS)
    metrics.registry.register(TierGauges(registry.tiers))
    lifecycle = Lifecycle(registry, metrics)
    management = Management(lifecycle, engine.config)
    handlers = Handlers(answering, metrics)
    routes = make_routes(handlers, management, metrics)
    config = engine.config

    def layers(app: ASGIApp) -> ASGIApp:
        """The gate, and around it what was switched on. Browsers ask before they send keys, so CORS comes first."""
        app = Gate(app, keyring, metrics, config.max_header_bytes, config.log_calls)
        if config.gzip_bytes:
            app = GZipMiddleware(app, minimum_size=config.gzip_bytes, compresslevel=1)
        if config.cors_origin:
            app = CORSMiddleware(app, config.cors_origin, ("GET", "POST"), SENT_HEADERS, expose_headers=TOLD_HEADERS)
        return app

    return Application(routes, layers, lifespan)


async def _follow(engine: Engine, lifecycle: Lifecycle) -> None:
    """From now on the desired-state file is followed or else, where that is asked for, the directory of deltas.

    The file is obeyed once before anything answers.
    """
    config = engine.config
    if config.state_file is not None:
        reconciler = Reconciler(config.state_file, lifecycle, engine.queue, config.watch_seconds or STATE_SECONDS)
        await reconciler.look()
        engine.background.loop("reconciler", reconciler.run)
    elif config.watch_seconds:
        engine.background.loop("watcher", Watcher(lifecycle, config.watch_seconds).run)


def make_routes(handlers: Handlers, management: Management, metrics: Metrics) -> list[Route]:
    """All routes, those that answer items first."""
    h, model, version = handlers, "/v2/models/{delta}", "/versions/{version}"

    def asked(endpoint: Endpoint) -> Endpoint:
        """An endpoint that refuses calls unread while the queue is full."""

        async def run(request: Request) -> Response:
            h.engine.admit()
            return await endpoint(request)

        return run

    def ask(path: str, endpoint: Endpoint) -> Route:
        return post(path, asked(endpoint))

    def both(path: str, on_get: Endpoint, on_post: Endpoint) -> Route:
        return Route(path, Guarded(metrics, GET=on_get, HEAD=on_get, POST=on_post), methods=["GET", "POST"])

    def post(path: str, endpoint: Endpoint) -> Route:
        return Route(path, Guarded(metrics, POST=endpoint), methods=["POST"])

    def get(path: str, endpoint: Endpoint) -> Route:
        return Route(path, Guarded(metrics, GET=endpoint, HEAD=endpoint), methods=["GET"])

    return [
        ask("/predict", h.predict),
        ask(f"{model}/infer", h.infer),
        ask(f"{model}{version}/infer", h.infer),
        both("/models/{delta}", h.model, asked(h.task)),
        get("/models/{delta}/info", h.model),
        get("/models/{delta}/health", h.model_health),
        get("/models", h.models),
        ask("/v1/embeddings", h.named.embeddings),
        ask("/v1/rerank", h.named.rerank),
        ask("/v2/rerank", h.named.rerank),
        ask("/score", h.named.score),
        ask("/classify", h.named.classify),
        ask("/v1/models/{delta}:predict", h.predict_v1),
        get("/v1/models", h.openai_models),
        get("/v1/models/{delta}", h.openai_model),
        get("/v2/health/live", h.live),
        get("/v2/health/ready", h.ready),
        get("/v2/models", h.oip_models),
        get("/v2/models/stats", h.statistics),
        get(f"{model}/stats", h.statistics),
        get(f"{model}{version}/stats", h.statistics),
        get(model, h.oip_model),
        get(f"{model}{version}", h.oip_model),
        get(f"{model}/config", h.oip_config),
        get(f"{model}{version}/config", h.oip_config),
        get(f"{model}/ready", h.oip_model_ready),
        get(f"{model}{version}/ready", h.oip_model_ready),
        get("/v2", h.server),
        post("/v2/repository/index", management.index),
        post("/v2/repository/models/{delta}/load", management.load),
        post("/v2/repository/models/{delta}/unload", management.unload),
        post("/v2/repository/models/{delta}/rollback", management.rollback),
        *(
            route(f"{base}/{name}", endpoint)
            for base in ("", "/tei/{delta}")
            for name, route, endpoint in (
                ("embed", ask, h.tei.embed),
                ("rerank", ask, h.tei.rerank),
                ("similarity", ask, h.tei.similarity),
                ("tokenize", post, h.tei.tokenize),
                ("decode", post, h.tei.decode),
            )
        ),
        ask("/tei/{delta}/predict", h.tei.predict),
        get("/tei/{delta}/info", h.tei.info),
        get("/info", h.tei.info),
        get("/health", h.health),
        get("/metrics", h.metrics_page),
        get("/openapi.json", h.openapi),
        get("/", h.about),
    ]


class Guarded:
    """Endpoints by method, whose errors are answers, and whose status is counted."""

    def __init__(self, metrics: Metrics, **endpoints: Endpoint) -> None:
        self._metrics, self._endpoints = metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call."""
        response = await self._response(Request(scope, receive))
        self._metrics.call(response.status_code)
        await named(response, scope)(scope, receive, send)

    async def _response(self, request: Request) -> Response:
        path = request.scope["path"]
        try:
            return await self._endpoints[request.method](request)
        except BertologyError as problem:
            return problem_response(problem, path)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=CLIENT_GONE)
        except Exception as problem:
            call = request_id_of(request.scope)
            log.error("%s %s raised %s (request %s)", request.method, path, place_of(problem), call)
            return problem_response(problem, path)
