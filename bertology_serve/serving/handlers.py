"""What each route does: read the body, decode, answer, encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve import __version__
from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.encoder.pipeline import Request as Item
from bertology_serve.serving.engine import Engine
from bertology_serve.serving.http import (
    BINARY,
    JSON,
    JSON_LENGTH,
    departure,
    header_length,
    json_response,
    read_body,
)
from bertology_serve.serving.metrics import CONTENT_TYPE, Metrics
from bertology_serve.serving.openapi import document
from bertology_serve.serving.protocol import hf, native, oip, oip_model
from bertology_serve.serving.registry import Registry


class Handlers:
    """The endpoints of one server."""

    def __init__(self, engine: Engine, registry: Registry, metrics: Metrics) -> None:
        self.engine, self.registry, self.metrics = engine, registry, metrics
        self.config = engine.config

    async def predict(self, request: Request) -> Response:
        """POST /predict"""
        call = native.read_call(await self._body(request))
        return _json(native.write_answers(call, await self._answer(request, call.requests)))

    async def task(self, request: Request) -> Response:
        """POST /models/{delta}"""
        delta = self.registry.find(request.path_params["delta"])
        call = hf.read_task(await self._body(request), delta)
        return _json(hf.write_task(call, await self._answer(request, call.requests)))

    async def infer(self, request: Request) -> Response:
        """POST /v2/models/{delta}[/versions/{version}]/infer"""
        find = self.registry.find
        model = find(request.path_params["delta"], request.path_params.get("version"))
        body = await self._body(request)
        call = oip.read_infer(body, header_length(request), model, find, self.config.max_items)
        content, json_length = oip.write_infer(call, await self._answer(request, call.requests))
        if json_length is None:
            return _json(content)
        return Response(content, headers={JSON_LENGTH: str(json_length)}, media_type=BINARY)

    async def about(self, request: Request) -> Response:
        """GET /"""
        return json_response(
            {
                "name": "bertology-serve",
                "version": __version__,
                "backbone": self.registry.pipeline.encoder.name,
                "deltas": len(self.registry.all()),
                "openapi": "/openapi.json",
            }
        )

    async def models(self, request: Request) -> Response:
        """GET /models"""
        return json_response([native.describe(delta) for delta in self.registry.all()])

    async def model(self, request: Request) -> Response:
        """GET /models/{delta} and /models/{delta}/info"""
        return json_response(native.describe(self.registry.find(request.path_params["delta"])))

    async def model_health(self, request: Request) -> Response:
        """GET /models/{delta}/health"""
        self.registry.find(request.path_params["delta"])
        return self._readiness({"ready": self.engine.ready})

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return json_response({"status": "ready" if self.engine.ready else "draining"})

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json"""
        return json_response(document())

    async def server(self, request: Request) -> Response:
        """GET /v2"""
        return json_response(oip_model.server_metadata())

    async def live(self, request: Request) -> Response:
        """GET /v2/health/live"""
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """GET /v2/health/ready"""
        return self._readiness({"ready": self.engine.ready})

    async def oip_models(self, request: Request) -> Response:
        """GET /v2/models"""
        return json_response({"models": [delta.name for delta in self.registry.all()]})

    async def oip_model(self, request: Request) -> Response:
        """GET /v2/models/{delta}[/versions/{version}]"""
        return json_response(oip_model.metadata(self._named(request)))

    async def oip_model_ready(self, request: Request) -> Response:
        """GET /v2/models/{delta}[/versions/{version}]/ready"""
        return self._readiness({"name": self._named(request).name, "ready": self.engine.ready})

    def _named(self, request: Request) -> Any:
        return self.registry.find(request.path_params["delta"], request.path_params.get("version"))

    def _readiness(self, body: dict[str, Any]) -> Response:
        return json_response(body, 200 if self.engine.ready else 503)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self.config.max_body_bytes)

    async def _answer(self, request: Request, items: Sequence[Item]) -> list[Prediction]:
        return await self.engine.answer(items, lambda: departure(request))


def _json(content: bytes) -> Response:
    return Response(content, media_type=JSON)
