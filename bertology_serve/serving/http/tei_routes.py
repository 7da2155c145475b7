"""Text Embeddings Inference's routes: at the root with ``model`` in the body, and below ``/tei/{delta}`` for clients
that know one model only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve.encoder.pipeline import BASE
from bertology_serve.serving.answering import Answering, of_one_version, size_of
from bertology_serve.serving.auth.gate import access_of
from bertology_serve.serving.batching.delta_queue import CallOptions
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.bodies import (
    JSON,
    answer_response,
    departure,
    json_response,
    priority_of,
    read_body,
    timeout_of,
)
from bertology_serve.serving.protocol.json_codec import object_of
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
