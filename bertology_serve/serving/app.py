"""The HTTP application: routes, and errors as answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from bertology_serve.errors import BertologyError
from bertology_serve.serving.answering import Answering
from bertology_serve.serving.engine import ClientGone, Engine
from bertology_serve.serving.faults import place_of
from bertology_serve.serving.gate import Gate
from bertology_serve.serving.handlers import Handlers
from bertology_serve.serving.http import error_response, problem_response
from bertology_serve.serving.keys import Keyring
from bertology_serve.serving.lifecycle import Lifecycle
from bertology_serve.serving.management import Management
from bertology_serve.serving.metrics import Metrics
from bertology_serve.serving.reconciler import Reconciler
from bertology_serve.serving.rpc.server import GrpcServer
from bertology_serve.serving.tiers.gauges import TierGauges
from bertology_serve.serving.watcher import Watcher

log = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]
STATE_SECONDS = 1.0  # how often the desired-state file is looked at
SLOTS = 10_000  # deltas that fit, as far as routers are told: memory is the bound
CLIENT_GONE = 499  # nobody reads it; it tells the metrics


def make_app(answering: Answering, metrics: Metrics, keyring: Keyring, rpc: GrpcServer | None = None) -> Starlette:
    """The application around an engine, which it starts and stops, and a gRPC port beside it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        following = await _following(engine, lifecycle)
        engine.start()
        if rpc:
            await rpc.start(answering, lifecycle, metrics, keyring)
        yield
        if following:
            following.cancel()
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
    gate = Middleware(Gate, keyring, metrics, engine.config.max_header_bytes, engine.config.log_calls)
    app = Starlette(routes=routes, middleware=[gate], lifespan=lifespan, exception_handlers={HTTPException: _refused})
    app.router.redirect_slashes = False
    return app


async def _following(engine: Engine, lifecycle: Lifecycle) -> asyncio.Task[None] | None:
    """What follows the desired-state file or else, where it is asked to, the directory of deltas.

    The file is obeyed once before anything answers.
    """
    config = engine.config
    if config.state_file is not None:
        reconciler = Reconciler(config.state_file, lifecycle, engine.queue, config.watch_seconds or STATE_SECONDS)
        await reconciler.look()
        return asyncio.create_task(reconciler.run())
    return asyncio.create_task(Watcher(lifecycle, config.watch_seconds).run()) if config.watch_seconds else None


def make_routes(handlers: Handlers, management: Management, metrics: Metrics) -> list[Route]:
    """All routes, those that answer items first."""
    h, model, version = handlers, "/v2/models/{delta}", "/versions/{version}"

    def both(path: str, on_get: Endpoint, on_post: Endpoint) -> Route:
        return Route(path, _by_method(_guarded(on_get, metrics), _guarded(on_post, metrics)), methods=["GET", "POST"])

    def post(path: str, endpoint: Endpoint) -> Route:
        return Route(path, _guarded(endpoint, metrics), methods=["POST"])

    def get(path: str, endpoint: Endpoint) -> Route:
        return Route(path, _guarded(endpoint, metrics), methods=["GET"])

    return [
        post("/predict", h.predict),
        post(f"{model}/infer", h.infer),
        post(f"{model}{version}/infer", h.infer),
        both("/models/{delta}", h.model, h.task),
        get("/models/{delta}/info", h.model),
        get("/models/{delta}/health", h.model_health),
        get("/models", h.models),
        post("/v1/embeddings", h.embeddings),
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
        get(f"{model}/ready", h.oip_model_ready),
        get(f"{model}{version}/ready", h.oip_model_ready),
        get("/v2", h.server),
        post("/v2/repository/index", management.index),
        post("/v2/repository/models/{delta}/load", management.load),
        post("/v2/repository/models/{delta}/unload", management.unload),
        post("/v2/repository/models/{delta}/rollback", management.rollback),
        *(
            post(f"{base}/{name}", endpoint)
            for base in ("", "/tei/{delta}")
            for name, endpoint in {
                "embed": h.tei.embed,
                "rerank": h.tei.rerank,
                "similarity": h.tei.similarity,
                "tokenize": h.tei.tokenize,
                "decode": h.tei.decode,
            }.items()
        ),
        post("/tei/{delta}/predict", h.tei.predict),
        get("/tei/{delta}/info", h.tei.info),
        get("/info", h.tei.info),
        get("/health", h.health),
        get("/metrics", h.metrics_page),
        get("/openapi.json", h.openapi),
        get("/", h.about),
    ]


def _guarded(endpoint: Endpoint, metrics: Metrics) -> Endpoint:
    """An endpoint whose errors are answers, and whose status is counted."""

    async def run(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except BertologyError as problem:
            response = problem_response(problem, request.scope["path"])
        except (ClientGone, ClientDisconnect):
            response = Response(status_code=CLIENT_GONE)
        except Exception as problem:
            log.error("%s %s raised %s", request.method, request.scope["path"], place_of(problem))
            response = problem_response(problem, request.scope["path"])
        metrics.call(response.status_code)
        return response

    return run


def _by_method(get: Endpoint, post: Endpoint) -> Endpoint:
    async def run(request: Request) -> Response:
        return await (post if request.method == "POST" else get)(request)

    return run


async def _refused(request: Request, problem: Exception) -> Response:
    """404 for unknown paths and 405 for other methods."""
    assert isinstance(problem, HTTPException)
    known = {404: "no such path; GET /openapi.json lists them", 405: f"{request.method} is not for this path"}
    message = known.get(problem.status_code, problem.detail)
    return error_response(message, problem.status_code, request.scope["path"], problem.headers)
