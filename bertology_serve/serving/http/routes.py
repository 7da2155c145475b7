"""What each route does: read the body, decode, answer, encode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve import __version__
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import BASE, Prediction
from bertology_serve.encoder.pipeline import Request as Item
from bertology_serve.errors import Forbidden
from bertology_serve.serving.answering import Answering, of_one_version, size_of
from bertology_serve.serving.batching.scheduler import CallOptions
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.bodies import (
    BINARY,
    JSON,
    JSON_LENGTH,
    answer_response,
    departure,
    header_length,
    json_response,
    priority_of,
    read_body,
    timeout_of,
)
from bertology_serve.serving.http.gate import access_of, request_id_of
from bertology_serve.serving.http.openapi import document
from bertology_serve.serving.observability.metrics import CONTENT_TYPE, Metrics
from bertology_serve.serving.protocol import hf, native, oip, oip_model, openai
from bertology_serve.serving.protocol.json_codec import object_of
from bertology_serve.serving.protocol.openai import (
    Receipt,
    read_classify,
    read_embeddings,
    read_rerank,
    read_score,
    write_classify,
    write_embeddings,
    write_rerank,
    write_score,
)
from bertology_serve.serving.protocol.tei import (
    EMBED,
    PREDICT,
    RERANK,
    SIMILARITY,
    Body,
    TeiCall,
    check_fit,
    ids,
    info,
    read_tei,
    tokenize,
    write_tei,
)
from bertology_serve.serving.versions.lifecycle import READY, UNAVAILABLE, Entry, Lifecycle


class TeiRoutes:
    """The endpoints; each is there twice, see above."""

    def __init__(self, answering: Answering) -> None:
        self._answering, self._config = answering, answering.engine.config
        self._encoder = answering.registry.pipeline.encoder

    async def embed(self, request: Request) -> Response:
        """POST /embed and /tei/{delta}/embed"""
        return await self.call(request, EMBED)

    async def predict(self, request: Request) -> Response:
        """POST /tei/{delta}/predict; at the root, /predict tells TEI's bodies by their field ``inputs``"""
        return await self.call(request, PREDICT)

    async def rerank(self, request: Request) -> Response:
        """POST /rerank and /tei/{delta}/rerank"""
        return await self.call(request, RERANK)

    async def similarity(self, request: Request) -> Response:
        """POST /similarity and /tei/{delta}/similarity"""
        return await self.call(request, SIMILARITY)

    async def call(self, request: Request, what: str, body: bytes | None = None) -> Response:
        """One call, whose body may have been read already."""
        content, engine = await self._body(request) if body is None else body, self._answering.engine
        access, named = access_of(request.scope), request.path_params.get("delta")

        async def answer() -> Response:
            def read() -> TeiCall:
                call = read_tei(content, what, partial(self._answering.find, access), named, self._config.max_items)
                check_fit(call, self._encoder.tokenizer, self._config.max_text_characters)
                return call

            call = await engine.aside(len(content), read)
            found = await self._answering.answer(
                access,
                call.requests,
                CallOptions(lambda: departure(request), seconds=timeout_of(request), priority=priority_of(request)),
            )
            return answer_response(await engine.aside(size_of(found), lambda: write_tei(call, found)), found)

        return await of_one_version(answer)

    async def info(self, request: Request) -> Response:
        """GET /info?model= and /tei/{delta}/info"""
        name = request.path_params.get("delta") or request.query_params.get("model") or BASE
        delta = self._answering.find(access_of(request.scope), name)
        return json_response(info(delta, self._config, str(self._encoder.dtype).removeprefix("torch.")))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize and /tei/{delta}/tokenize"""
        return await self._tokens(request, tokenize)

    async def decode(self, request: Request) -> Response:
        """POST /decode and /tei/{delta}/decode"""
        return await self._tokens(request, ids)

    async def _tokens(self, request: Request, what: Callable[[Body, Any, ServerConfig], bytes]) -> Response:
        """Tokens of texts, or texts of tokens. All deltas share the tokenizer; the one that is named must be there."""
        access, named = access_of(request.scope), request.path_params.get("delta")
        if named:
            self._answering.find(access, named)
        body = await self._body(request)

        def answer() -> bytes:
            value = object_of(body)
            if not named and isinstance(value.get("model"), str):
                self._answering.find(access, value["model"])
            return what(value, self._encoder.tokenizer, self._config)

        return Response(await self._answering.engine.aside(len(body), answer), media_type=JSON)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.max_body_seconds)


class Call(Protocol):
    """What is read of a body."""

    @property
    def requests(self) -> list[Item]: ...


C = TypeVar("C", bound=Call)


class ModelRoutes:
    """The endpoints."""

    def __init__(self, answering: Answering) -> None:
        self._answering, self._config = answering, answering.engine.config

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        return await self._call(request, read_embeddings, write_embeddings)

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank and /v2/rerank"""
        return await self._call(request, read_rerank, write_rerank)

    async def score(self, request: Request) -> Response:
        """POST /score"""
        return await self._call(request, read_score, write_score)

    async def classify(self, request: Request) -> Response:
        """POST /classify"""
        return await self._call(request, read_classify, write_classify)

    async def _call(
        self,
        request: Request,
        read: Callable[[bytes, Callable[[str], Delta], float], C],
        write: Callable[[C, Sequence[Prediction], Receipt], bytes],
    ) -> Response:
        body = await read_body(request, self._config.max_body_bytes, self._config.max_body_seconds)
        access, aside, tokens = access_of(request.scope), self._answering.engine.aside, 0
        find, most = partial(self._answering.find, access), self._config.max_items

        def charge(cost: int) -> None:
            nonlocal tokens
            access.charge(cost)
            tokens = cost

        async def answer() -> Response:
            call = await aside(len(body), lambda: read(body, find, most))
            terms = CallOptions(lambda: departure(request), charge, timeout_of(request), priority_of(request))
            found = await self._answering.answer(access, call.requests, terms)
            receipt = Receipt(request_id_of(request.scope), int(time.time()), tokens)
            return answer_response(await aside(size_of(found), lambda: write(call, found, receipt)), found)

        return await of_one_version(answer)


class Handlers:
    """The endpoints of one server."""

    def __init__(self, answering: Answering, metrics: Metrics) -> None:
        self.engine, self.registry, self.metrics = answering.engine, answering.registry, metrics
        self.answering = answering
        self.config = self.engine.config
        self.tei, self.named = TeiRoutes(self.answering), ModelRoutes(self.answering)
        self._started = int(time.time())

    async def predict(self, request: Request) -> Response:
        """POST /predict, in this project's shape or in TEI's"""
        body = await self._body(request)
        aside, most = self.engine.aside, self.config.max_items
        if await aside(len(body), lambda: native.is_tei(body)):
            return await self.tei.call(request, PREDICT, body)
        call = await aside(len(body), lambda: native.read_call(body, most))

        async def answer() -> Response:
            found = await self._answer(request, call.requests)
            content = await aside(size_of(found), lambda: native.write_answers(call, found))
            return answer_response(content, found)

        return await of_one_version(answer)

    async def task(self, request: Request) -> Response:
        """POST /models/{delta}"""
        body = await self._body(request)
        aside, most = self.engine.aside, self.config.max_items

        async def answer() -> Response:
            delta = self._named(request)
            call = await aside(len(body), lambda: hf.read_task(body, delta, most))
            found = await self._answer(request, call.requests)
            return answer_response(await aside(size_of(found), lambda: hf.write_task(call, found)), found)

        return await of_one_version(answer)

    async def infer(self, request: Request) -> Response:
        """POST /v2/models/{delta}[/versions/{version}]/infer"""
        self._named(request)  # an unknown name is told before the body is read
        body, length = await self._body(request), header_length(request)
        find, aside = partial(self.answering.find, access_of(request.scope)), self.engine.aside

        async def answer() -> Response:
            delta = self._named(request)
            call = await aside(len(body), lambda: oip.read_infer(body, length, delta, find, self.config.max_items))
            found = await self._answer(request, call.requests, call.seconds, priority=call.priority)
            content, json_length = await aside(size_of(found), lambda: oip.write_infer(call, found))
            if json_length is None:
                return answer_response(content, found)
            return answer_response(content, found, BINARY, {JSON_LENGTH: str(json_length)})

        return await of_one_version(answer)

    async def predict_v1(self, request: Request) -> Response:
        """POST /v1/models/{delta}:predict"""
        body = await self._body(request)
        aside, most = self.engine.aside, self.config.max_items

        async def answer() -> Response:
            delta = self._named(request)
            requests = await aside(len(body), lambda: native.read_predict(body, delta, most))
            found = await self._answer(request, requests)
            content = await aside(size_of(found), lambda: native.write_predict(requests, found))
            return answer_response(content, found)

        return await of_one_version(answer)

    async def openai_models(self, request: Request) -> Response:
        """GET /v1/models, for OpenAI's client and for KServe's, which reads ``models``"""
        data = [openai.describe(delta, self._started, self.engine.ready) for delta in self._visible(request)]
        return json_response({"object": "list", "data": data, "models": [one["id"] for one in data]})

    async def openai_model(self, request: Request) -> Response:
        """GET /v1/models/{delta}"""
        return json_response(openai.describe(self._named(request), self._started, self.engine.ready))

    async def about(self, request: Request) -> Response:
        """GET /"""
        return json_response(
            {
                "name": "bertology-serve",
                "version": __version__,
                "status": "alive",  # the liveness of KServe's first protocol
                "backbone": self.registry.pipeline.encoder.name,
                "deltas": len(self._visible(request)),
                "openapi": "/openapi.json",
            }
        )

    async def models(self, request: Request) -> Response:
        """GET /models"""
        return json_response([native.describe(delta) for delta in self._visible(request)])

    async def model(self, request: Request) -> Response:
        """GET /models/{delta} and /models/{delta}/info"""
        return json_response(native.describe(self._named(request)))

    async def model_health(self, request: Request) -> Response:
        """GET /models/{delta}/health"""
        self._named(request)
        return self._readiness({"ready": self.engine.ready})

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return json_response({"status": self.engine.state})

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics; its labels name every delta, so it needs a key that opens all"""
        if access_of(request.scope).restricted:
            raise Forbidden("the metrics name every delta; use an API key that opens all of them")
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
        return json_response({"models": [delta.name for delta in self._visible(request)]})

    async def oip_model(self, request: Request) -> Response:
        """GET /v2/models/{delta}[/versions/{version}]"""
        return json_response(oip_model.metadata(self._named(request)))

    async def oip_config(self, request: Request) -> Response:
        """GET /v2/models/{delta}[/versions/{version}]/config"""
        return json_response(oip_model.config(self._named(request)))

    async def statistics(self, request: Request) -> Response:
        """GET /v2/models/stats and /v2/models/{delta}[/versions/{version}]/stats"""
        deltas = [self._named(request)] if "delta" in request.path_params else self._visible(request)
        return json_response(self.metrics.statistics.of(deltas))

    async def oip_model_ready(self, request: Request) -> Response:
        """GET /v2/models/{delta}[/versions/{version}]/ready"""
        return self._readiness({"name": self._named(request).name, "ready": self.engine.ready})

    def _named(self, request: Request) -> Delta:
        """The delta that the path names."""
        return self.answering.find(
            access_of(request.scope), request.path_params["delta"], request.path_params.get("version")
        )

    def _visible(self, request: Request) -> list[Delta]:
        return self.answering.visible(access_of(request.scope))

    def _readiness(self, body: dict[str, Any]) -> Response:
        return json_response(body, 200 if self.engine.ready else 503)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self.config.max_body_bytes, self.config.max_body_seconds)

    async def _answer(
        self,
        request: Request,
        items: Sequence[Item],
        seconds: float = math.inf,
        priority: int = 0,
    ) -> list[Prediction]:
        """The answers, within the caller's rights, rates and time."""
        terms = CallOptions(
            lambda: departure(request), None, min(seconds, timeout_of(request)), priority or priority_of(request)
        )
        return await self.answering.answer(access_of(request.scope), items, terms)


class Management:
    """The endpoints of the model repository extension."""

    def __init__(self, lifecycle: Lifecycle, config: ServerConfig) -> None:
        self.lifecycle, self._config = lifecycle, config

    async def index(self, request: Request) -> Response:
        """POST /v2/repository/index"""
        access_of(request.scope).check_admin()
        ready_only = oip_model.read_index(await self._body(request))
        return json_response([asdict(entry) for entry in await self.lifecycle.index(ready_only)])

    async def load(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/load"""
        access_of(request.scope).check_admin()
        version = oip_model.read_load(await self._body(request))
        delta = await self.lifecycle.load(request.path_params["delta"], version)
        return json_response(asdict(Entry(delta.name, delta.version, READY)))

    async def rollback(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/rollback, this project's own"""
        access_of(request.scope).check_admin()
        oip_model.read_unload(await self._body(request))
        delta = await self.lifecycle.rollback(request.path_params["delta"])
        return json_response(asdict(Entry(delta.name, delta.version, READY)))

    async def unload(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/unload"""
        access_of(request.scope).check_admin()
        oip_model.read_unload(await self._body(request))
        name = request.path_params["delta"]
        await self.lifecycle.unload(name)
        return json_response(asdict(Entry(name, "", UNAVAILABLE, "unloaded")))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.max_body_seconds)
