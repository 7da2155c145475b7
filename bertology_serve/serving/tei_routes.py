"""Text Embeddings Inference's routes: at the root with ``model`` in the body, and below ``/tei/{delta}`` for clients
that know one model only."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve.encoder.pipeline import BASE
from bertology_serve.serving.answering import Answering, of_one_version
from bertology_serve.serving.gate import access_of
from bertology_serve.serving.http import (
    JSON,
    answer_response,
    departure,
    json_response,
    priority_of,
    read_body,
    timeout_of,
)
from bertology_serve.serving.protocol.tei import EMBED, PREDICT, RERANK, SIMILARITY, read_tei, write_tei
from bertology_serve.serving.protocol.tei_tokens import check_fit, ids, info, tokenize
from bertology_serve.serving.terms import Terms


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
        content = await self._body(request) if body is None else body
        access, named = access_of(request.scope), request.path_params.get("delta")

        async def answer() -> Response:
            call = read_tei(content, what, partial(self._answering.find, access), named)
            check_fit(call, self._encoder.tokenizer)
            found = await self._answering.answer(
                access,
                call.requests,
                Terms(lambda: departure(request), seconds=timeout_of(request), priority=priority_of(request)),
            )
            return answer_response(write_tei(call, found), found)

        return await of_one_version(answer)

    async def info(self, request: Request) -> Response:
        """GET /info?model= and /tei/{delta}/info"""
        name = request.path_params.get("delta") or request.query_params.get("model") or BASE
        delta = self._answering.find(access_of(request.scope), name)
        return json_response(info(delta, self._config, str(self._encoder.dtype).removeprefix("torch.")))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize and /tei/{delta}/tokenize"""
        return Response(tokenize(await self._body(request), self._encoder.tokenizer), media_type=JSON)

    async def decode(self, request: Request) -> Response:
        """POST /decode and /tei/{delta}/decode"""
        return Response(ids(await self._body(request), self._encoder.tokenizer), media_type=JSON)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.max_body_seconds)
