"""The routes whose body names the model and whose answer tells its tokens: OpenAI's, Cohere's and Jina's, vLLM's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.encoder.pipeline import Request as Item
from bertology_serve.serving.answering import Answering, of_one_version, size_of
from bertology_serve.serving.auth.gate import access_of, request_id_of
from bertology_serve.serving.batching.delta_queue import CallOptions
from bertology_serve.serving.http.bodies import answer_response, departure, priority_of, read_body, timeout_of
from bertology_serve.serving.protocol.openai import Receipt, read_embeddings, write_embeddings
from bertology_serve.serving.protocol.rerank import read_rerank, write_rerank
from bertology_serve.serving.protocol.vllm import read_classify, read_score, write_classify, write_score


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
