"""The clients: one that blocks, and one for asyncio, with the same methods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self, TypeVar

import httpx

from bertology_serve.client import calls
from bertology_serve.client.calls import Call
from bertology_serve.errors import BertologyError
from bertology_serve.tasks.answers import Answer, Model, Version

if TYPE_CHECKING:
    from bertology_serve.files import JsonMapping


T = TypeVar("T")


class Client:
    """Asks one server. ``key`` is an API key; ``seconds`` is how long a call may take on the way and there together;
    ``retries`` how often a call is repeated that the server refused, naming a time, or that never reached it (a GET:
    that got no answer). Use it in a ``with``.

    Raises the errors of ``bertology_serve.errors`` that the server meant: NotFound, RateLimited, Expired ...
    """

    def __init__(self, url: str, key: str | None = None, seconds: float = 30.0, retries: int = 2) -> None:
        self._http = httpx.Client(base_url=url, headers=calls.headers_of(key), timeout=seconds)
        self._retries = retries

    def ask(self, delta: str, text: str | JsonMapping, *, seconds: float | None = None) -> Answer:
        """One delta's answer to a text, or to a record of its task's fields (``question`` and ``context`` ...)."""
        return (self.answer(calls.items_of(delta, [text]), seconds=seconds))[0]

    def answer(self, items: Iterable[JsonMapping], *, seconds: float | None = None) -> tuple[Answer, ...]:
        """The answers to items of any deltas, ``{"delta", "text", ...}``, in order.

        Expired is raised where they are not there within ``seconds``; what was still queued is then not computed.
        """
        return self._send(calls.answer(items, seconds))

    def ask_many(
        self, deltas: Iterable[str], text: str | JsonMapping, *, seconds: float | None = None
    ) -> dict[str, Answer]:
        """Several deltas' answers to one text, by name; the server computes it once, as far as the deltas let it.

        Options that only some of their tasks take are for those.
        """
        return (self._send(calls.ask_many(deltas, text, seconds))).deltas

    def embed(self, delta: str, texts: Sequence[str], *, seconds: float | None = None) -> list[tuple[float, ...]]:
        """The vectors of texts; ``base`` is the bare encoder."""
        return calls.vectors_of(self.answer(calls.items_of(delta, texts), seconds=seconds))

    def deltas(self) -> tuple[Model, ...]:
        """What answers."""
        return self._send(calls.models())

    def ready(self) -> bool:
        """Whether the server takes calls; false where there is none."""
        try:
            reply = self._reply(calls.ready())
            return calls.ready().read(reply.status_code, reply.content, None)["ready"]
        except (BertologyError, httpx.TransportError):
            return False

    def index(self) -> tuple[Version, ...]:
        """Every version on the server's disk or in its memory. Needs a key with admin rights, as what follows."""
        return self._send(calls.index())

    def load(self, delta: str, version: str | None = None) -> Version:
        """Makes a version answer; the newest where none is named."""
        return self._send(calls.load(delta, version))

    def unload(self, delta: str) -> Version:
        """Takes a delta away."""
        return self._send(calls.unload(delta))

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def _send(self, call: Call[T]) -> T:
        left = self._retries
        while True:
            try:
                reply = self._reply(call)
            except httpx.TransportError as problem:
                call.check_unsent(problem, self._http.base_url)
                if not left:
                    raise calls.lost(problem, self._http.base_url) from None
            else:
                after = reply.headers.get("retry-after")
                wait = call.wait(reply.status_code, after)
                if wait is None or not left:
                    return call.read(reply.status_code, reply.content, after)
                time.sleep(wait)
            left -= 1

    def _reply(self, call: Call[T]) -> httpx.Response:
        return self._http.request(call.method, call.path, content=call.content, headers=call.headers)


class AsyncClient:
    """Asks one server. ``key`` is an API key; ``seconds`` is how long a call may take on the way and there together;
    ``retries`` how often a call is repeated that the server refused, naming a time, or that never reached it (a GET:
    that got no answer). Use it in an ``async with``.

    Raises the errors of ``bertology_serve.errors`` that the server meant: NotFound, RateLimited, Expired ...
    """

    def __init__(self, url: str, key: str | None = None, seconds: float = 30.0, retries: int = 2) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=calls.headers_of(key), timeout=seconds)
        self._retries = retries

    async def ask(self, delta: str, text: str | JsonMapping, *, seconds: float | None = None) -> Answer:
        """One delta's answer to a text, or to a record of its task's fields (``question`` and ``context`` ...)."""
        return (await self.answer(calls.items_of(delta, [text]), seconds=seconds))[0]

    async def answer(self, items: Iterable[JsonMapping], *, seconds: float | None = None) -> tuple[Answer, ...]:
        """The answers to items of any deltas, ``{"delta", "text", ...}``, in order.

        Expired is raised where they are not there within ``seconds``; what was still queued is then not computed.
        """
        return await self._send(calls.answer(items, seconds))

    async def ask_many(
        self, deltas: Iterable[str], text: str | JsonMapping, *, seconds: float | None = None
    ) -> dict[str, Answer]:
        """Several deltas' answers to one text, by name; the server computes it once, as far as the deltas let it.

        Options that only some of their tasks take are for those.
        """
        return (await self._send(calls.ask_many(deltas, text, seconds))).deltas

    async def embed(self, delta: str, texts: Sequence[str], *, seconds: float | None = None) -> list[tuple[float, ...]]:
        """The vectors of texts; ``base`` is the bare encoder."""
        return calls.vectors_of(await self.answer(calls.items_of(delta, texts), seconds=seconds))

    async def deltas(self) -> tuple[Model, ...]:
        """What answers."""
        return await self._send(calls.models())

    async def ready(self) -> bool:
        """Whether the server takes calls; false where there is none."""
        try:
            reply = await self._reply(calls.ready())
            return calls.ready().read(reply.status_code, reply.content, None)["ready"]
        except (BertologyError, httpx.TransportError):
            return False

    async def index(self) -> tuple[Version, ...]:
        """Every version on the server's disk or in its memory. Needs a key with admin rights, as what follows."""
        return await self._send(calls.index())

    async def load(self, delta: str, version: str | None = None) -> Version:
        """Makes a version answer; the newest where none is named."""
        return await self._send(calls.load(delta, version))

    async def unload(self, delta: str) -> Version:
        """Takes a delta away."""
        return await self._send(calls.unload(delta))

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes it."""
        await self.aclose()

    async def _send(self, call: Call[T]) -> T:
        left = self._retries
        while True:
            try:
                reply = await self._reply(call)
            except httpx.TransportError as problem:
                call.check_unsent(problem, self._http.base_url)
                if not left:
                    raise calls.lost(problem, self._http.base_url) from None
            else:
                after = reply.headers.get("retry-after")
                wait = call.wait(reply.status_code, after)
                if wait is None or not left:
                    return call.read(reply.status_code, reply.content, after)
                await asyncio.sleep(wait)
            left -= 1

    async def _reply(self, call: Call[T]) -> httpx.Response:
        return await self._http.request(call.method, call.path, content=call.content, headers=call.headers)
