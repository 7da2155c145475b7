"""What each route does: read the body, decode, answer, encode."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bertology_serve import __version__
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import BASE, Prediction
from bertology_serve.errors import Forbidden
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.bodies import (
    BINARY,
    JSON_LENGTH,
    access_of,
    answer_response,
    header_length,
    read_body,
    receive,
)
from bertology_serve.serving.http.errors import JSON, json_response
from bertology_serve.serving.http.gate import Endpoint, Guarded, wants_page
from bertology_serve.serving.http.openapi import document
from bertology_serve.serving.http.request_id import request_id_of
from bertology_serve.serving.observability.metrics import CONTENT_TYPE
from bertology_serve.serving.protocol import hf, native, oip, oip_model, openai, tei
from bertology_serve.serving.protocol.json_codec import object_of
from bertology_serve.serving.service import Find, Parsed, Service
from bertology_serve.serving.versions.desired import parse_desired
from bertology_serve.serving.versions.lifecycle import READY, UNAVAILABLE
from bertology_serve.tasks.answers import Reconciled, Version

P = TypeVar("P", bound=Parsed)


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page of ``GET /`` and its headers. It holds nothing of this server: its script asks for the deltas, with the
    key that it is given. Nothing but its own style and script runs in it, and it talks to this server alone.
    """
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    parts = {tag: re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("style", "script")}
    hashes = {tag: hashlib.sha256(part[1].encode()).digest() for tag, part in parts.items() if part}
    allowed = "; ".join(f"{tag}-src 'sha256-{base64.b64encode(own).decode()}'" for tag, own in hashes.items())
    policy = f"default-src 'none'; {allowed}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    headers = {
        "Content-Security-Policy": policy + "frame-ancestors 'none'",
        "Vary": "Accept",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html, headers


class Routes:
    """The endpoints of one server.

    TEI's are there twice: at the root with ``model`` in the body, and below ``/tei/{delta}`` for clients that know one
    model only.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.registry, self.metrics = service, service.registry, service.metrics
        self.config, self.lifecycle = service.config, service.lifecycle
        self._encoder = self.registry.pipeline.encoder
        self._started = int(time.time())

    def table(self) -> list[Route]:
        """All routes, those that answer items first. Calls for items are refused unread while the queue is full."""
        model, version = "/v2/models/{delta}", "/versions/{version}"

        def ask(path: str, endpoint: Endpoint) -> Route:
            return Route(path, Guarded(self.metrics, self.service.queue.check, POST=endpoint), methods=["POST"])

        def post(path: str, endpoint: Endpoint) -> Route:
            return Route(path, Guarded(self.metrics, POST=endpoint), methods=["POST"])

        def get(path: str, endpoint: Endpoint) -> Route:
            return Route(path, Guarded(self.metrics, GET=endpoint, HEAD=endpoint), methods=["GET"])

        both = Guarded(self.metrics, self.service.queue.check, GET=self.model, HEAD=self.model, POST=self.task)
        return [
            ask("/predict", self.predict),
            ask(f"{model}/infer", self.infer),
            ask(f"{model}{version}/infer", self.infer),
            Route("/models/{delta}", both, methods=["GET", "POST"]),
            get("/models/{delta}/info", self.model),
            get("/models/{delta}/health", self.model_health),
            get("/models", self.models),
            ask("/v1/embeddings", self.embeddings),
            ask("/v2/embed", self.embed),
            ask("/v1/rerank", self.rerank),
            ask("/v2/rerank", self.rerank),
            ask("/score", self.score),
            ask("/classify", self.classify),
            ask("/v1/models/{delta}:predict", self.predict_v1),
            get("/v1/models", self.openai_models),
            get("/v1/models/{delta}", self.openai_model),
            get("/v2/health/live", self.live),
            get("/v2/health/ready", self.ready),
            get("/v2/models", self.oip_models),
            get("/v2/models/stats", self.statistics),
            get(f"{model}/stats", self.statistics),
            get(f"{model}{version}/stats", self.statistics),
            get(model, self.oip_model),
            get(f"{model}{version}", self.oip_model),
            get(f"{model}/config", self.oip_config),
            get(f"{model}{version}/config", self.oip_config),
            get(f"{model}/ready", self.oip_model_ready),
            get(f"{model}{version}/ready", self.oip_model_ready),
            get("/v2", self.server),
            post("/v2/repository/index", self.index),
            post("/v2/repository/state", self.state),
            post("/v2/repository/models/{delta}/load", self.load),
            post("/v2/repository/models/{delta}/unload", self.unload),
            post("/v2/repository/models/{delta}/rollback", self.rollback),
            *(
                route(f"{base}/{name}", endpoint)
                for base in ("", "/tei/{delta}")
                for name, route, endpoint in (
                    ("embed", ask, partial(self.ask_tei, what=tei.EMBED)),
                    ("embed_sparse", ask, partial(self.ask_tei, what=tei.EMBED_SPARSE)),
                    ("embed_all", ask, partial(self.ask_tei, what=tei.EMBED_ALL)),
                    ("rerank", ask, partial(self.ask_tei, what=tei.RERANK)),
                    ("similarity", ask, partial(self.ask_tei, what=tei.SIMILARITY)),
                    ("tokenize", post, partial(self.tokens, what=tei.tokenize)),
                    ("decode", post, partial(self.tokens, what=tei.ids)),
                )
            ),
            ask("/tei/{delta}/predict", partial(self.ask_tei, what=tei.PREDICT)),
            get("/tei/{delta}/info", self.tei_info),
            get("/info", self.tei_info),
            get("/health", self.health),
            get("/metrics", self.metrics_page),
            get("/openapi.json", self.openapi),
            get("/", self.about),
        ]

    async def predict(self, request: Request) -> Response:
        """POST /predict, in this project's shape or in TEI's, which is told by its field ``inputs``"""
        body, call = await receive(request, self.config)
        if native.INPUTS in body and await self.service.aside(len(body), lambda: native.is_tei(body)):
            reader = self._tei_reader(request, body, tei.PREDICT)
            return answer_response(*await self.service.serve(call, len(body), reader, tei.write_tei))
        read = partial(native.read_call, body, self.config.limits.max_items)
        return answer_response(*await self.service.serve(call, len(body), read, native.write_answers))

    async def task(self, request: Request) -> Response:
        """POST /models/{delta}"""
        body, call = await receive(request, self.config)
        name, most = request.path_params["delta"], self.config.limits.max_items

        def read(find: Find) -> hf.TaskCall:
            return hf.read_task(body, find(name), most)

        return answer_response(*await self.service.serve(call, len(body), read, hf.write_task))

    async def predict_v1(self, request: Request) -> Response:
        """POST /v1/models/{delta}:predict"""
        body, call = await receive(request, self.config)
        name, most = request.path_params["delta"], self.config.limits.max_items

        def read(find: Find) -> native.NativeCall:
            return native.read_instances(body, find(name), most)

        return answer_response(*await self.service.serve(call, len(body), read, native.write_predictions))

    async def infer(self, request: Request) -> Response:
        """POST /v2/models/{delta}[/versions/{version}]/infer"""
        self._named(request)  # an unknown name is told before the body is read
        body, call = await receive(request, self.config)
        length, name, version = header_length(request), request.path_params["delta"], request.path_params.get("version")

        def read(find: Find) -> oip.InferCall:
            found = oip.read_infer(body, length, find(name, version), find, self.config.limits.max_items)
            call.seconds, call.priority = min(call.seconds, found.seconds), found.priority or call.priority
            return found

        (content, json_length), found = await self.service.serve(call, len(body), read, oip.write_infer)
        if json_length is None:
            return answer_response(content, found)
        return answer_response(content, found, BINARY, {JSON_LENGTH: str(json_length)})

    async def ask_tei(self, request: Request, what: str) -> Response:
        """POST /embed, /embed_sparse, /embed_all, /rerank, /similarity, the same and /predict below /tei/{delta}"""
        body, call = await receive(request, self.config)
        reader = self._tei_reader(request, body, what)
        return answer_response(*await self.service.serve(call, len(body), reader, tei.write_tei))

    def _tei_reader(self, request: Request, body: bytes, what: str) -> Callable[[Find], tei.TeiCall]:
        named, config = request.path_params.get("delta"), self.config

        def read(find: Find) -> tei.TeiCall:
            call = tei.read_tei(body, what, find, named, config.limits.max_items)
            tei.check_fit(call, self._encoder.tokenizer, config.limits.max_text_characters)
            return call

        return read

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        return await self._told(request, openai.read_embeddings, openai.write_embeddings)

    async def embed(self, request: Request) -> Response:
        """POST /v2/embed"""
        return await self._told(request, openai.read_embed, openai.write_embed)

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank and /v2/rerank"""
        return await self._told(request, openai.read_rerank, openai.write_rerank)

    async def score(self, request: Request) -> Response:
        """POST /score"""
        return await self._told(request, openai.read_score, openai.write_score)

    async def classify(self, request: Request) -> Response:
        """POST /classify"""
        return await self._told(request, openai.read_classify, openai.write_classify)

    async def _told(
        self,
        request: Request,
        read: Callable[[bytes, Callable[[str], Delta], float], P],
        write: Callable[[P, Sequence[Prediction], openai.Receipt], bytes],
    ) -> Response:
        """A call whose answer tells its id and its tokens."""
        body, call = await receive(request, self.config)
        most = self.config.limits.max_items

        def written(parsed: P, found: list[Prediction]) -> bytes:
            return write(parsed, found, openai.Receipt(request_id_of(request.scope), int(time.time()), call.tokens))

        return answer_response(*await self.service.serve(call, len(body), lambda find: read(body, find, most), written))

    async def tokens(
        self, request: Request, what: Callable[[tei.Body, tei.Tokenizer, ServerConfig], bytes]
    ) -> Response:
        """POST /tokenize and /decode, also below /tei/{delta}: tokens of texts, or texts of tokens.

        All deltas share the tokenizer; the one that is named must be there.
        """
        access, named = access_of(request.scope), request.path_params.get("delta")
        if named:
            self.service.find(access, named)
        body = await read_body(request, self.config)

        def answer() -> bytes:
            value = object_of(body)
            name = value.get("model")
            if not named and isinstance(name, str):
                self.service.find(access, name)
            return what(value, self._encoder.tokenizer, self.config)

        return Response(await self.service.aside(len(body), answer), media_type=JSON)

    async def tei_info(self, request: Request) -> Response:
        """GET /info?model= and /tei/{delta}/info"""
        name = request.path_params.get("delta") or request.query_params.get("model") or BASE
        delta = self.service.find(access_of(request.scope), name)
        return json_response(tei.info(delta, self.config, str(self._encoder.dtype).removeprefix("torch.")))

    async def openai_models(self, request: Request) -> Response:
        """GET /v1/models, for OpenAI's client and for KServe's, which reads ``models``"""
        data = [openai.describe(delta, self._started, self.service.ready) for delta in self._visible(request)]
        return json_response({"object": "list", "data": data, "models": [one["id"] for one in data]})

    async def openai_model(self, request: Request) -> Response:
        """GET /v1/models/{delta}"""
        return json_response(openai.describe(self._named(request), self._started, self.service.ready))

    async def about(self, request: Request) -> Response:
        """GET /: a page for browsers, which asks what it shows by itself, and facts for others"""
        if wants_page(request.scope):
            html, headers = page()
            return Response(html, headers=headers, media_type="text/html")
        return json_response(
            headers={"Vary": "Accept"},
            value={
                "name": "bertology-serve",
                "version": __version__,
                "status": "alive",  # the liveness of KServe's first protocol
                "backbone": self._encoder.name,
                "deltas": len(self._visible(request)),
                "openapi": "/openapi.json",
            },
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
        return self._readiness({"ready": self.service.ready})

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return json_response({"status": self.service.state})

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
        return self._readiness({"ready": self.service.ready})

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
        return self._readiness({"name": self._named(request).name, "ready": self.service.ready})

    async def index(self, request: Request) -> Response:
        """POST /v2/repository/index"""
        access_of(request.scope).check_admin()
        ready_only = oip_model.read_index(await read_body(request, self.config))
        return json_response(await self.lifecycle.index(ready_only))

    async def load(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/load"""
        access_of(request.scope).check_admin()
        version = oip_model.read_load(await read_body(request, self.config))
        delta = await self.lifecycle.load(request.path_params["delta"], version)
        return json_response(Version(delta.name, delta.version, READY))

    async def state(self, request: Request) -> Response:
        """POST /v2/repository/state, this project's own: a desired state as in ``--state-file``, obeyed at once"""
        access_of(request.scope).check_admin()
        desired = parse_desired(await read_body(request, self.config), "the body")
        return json_response(Reconciled(await self.service.reconciler.apply(desired)))

    async def rollback(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/rollback, this project's own"""
        access_of(request.scope).check_admin()
        oip_model.read_unload(await read_body(request, self.config))
        delta = await self.lifecycle.rollback(request.path_params["delta"])
        return json_response(Version(delta.name, delta.version, READY))

    async def unload(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/unload"""
        access_of(request.scope).check_admin()
        oip_model.read_unload(await read_body(request, self.config))
        name = request.path_params["delta"]
        await self.lifecycle.unload(name)
        return json_response(Version(name, "", UNAVAILABLE, "unloaded"))

    def _named(self, request: Request) -> Delta:
        return self.service.find(
            access_of(request.scope), request.path_params["delta"], request.path_params.get("version")
        )

    def _visible(self, request: Request) -> list[Delta]:
        return self.service.visible(access_of(request.scope))

    def _readiness(self, body: dict[str, object]) -> Response:
        return json_response(body, 200 if self.service.ready else 503)
