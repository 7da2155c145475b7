"""A client of the server, for programs: ``Client``, and ``AsyncClient`` with the same methods.

What the server may have begun is not sent again: to compute it twice helps nobody, least of all a server that is too
slow. Repeated are calls that it refused and named a time for (429 and 503 with ``Retry-After``), those that never
reached it because there was no connection, and GETs, which change nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import httpx
import msgspec

from bertology_serve.errors import (
    BertologyError,
    Expired,
    Forbidden,
    InputError,
    LimitError,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
)
from bertology_serve.tasks.answers import Answer, Entity, Model, SeveralAnswers, Span, Version

if TYPE_CHECKING:
    from bertology_serve.files import JsonMapping, JsonObject

__all__ = ["Answer", "AsyncClient", "Client", "Entity", "Model", "Span", "Version"]

T = TypeVar("T")
LONGEST_WAIT = 60.0
UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
_ERRORS: Mapping[int, type[BertologyError]] = {
    400: InputError, 401: Unauthorized, 403: Forbidden, 404: NotFound, 413: LimitError, 431: LimitError, 504: Expired,
}  # fmt: skip


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call: ``kind`` is what its reply is read as. ``body`` is sent as JSON, ``None`` without one."""

    method: str
    path: str
    kind: type[T] | Any
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def wait(self, status: int, retry_after: str | None) -> float | None:
        """The seconds after which a call with this reply is sent again; ``None`` where the reply stands."""
        if status not in (429, 503) or not (retry_after or self.method == "GET"):
            return None
        return seconds_of(retry_after)

    def check_unsent(self, problem: httpx.TransportError, url: object) -> None:
        """Raises BertologyError where a call that failed like this may have reached the server, and is no GET."""
        if self.method != "GET" and not isinstance(problem, UNSENT):
            raise lost(problem, url, "it may have been computed: send it again only where that does no harm") from None

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else msgspec.json.encode(self.body)

    def read(self, status: int, content: bytes, retry_after: str | None) -> T:
        if status != 200:
            raise problem_of(status, content, retry_after)
        try:
            found: T = msgspec.json.decode(content, type=self.kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as problem:
            raise BertologyError(f"{self.path}: no answer of bertology-serve ({problem}); check the address") from None
        return found


def problem_of(status: int, content: bytes, retry_after: str | None) -> BertologyError:
    """The error of a reply, by its status."""
    try:
        message = str(msgspec.json.decode(content)["error"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        message = f"the server answered {status}"
    if status in (429, 503):
        return (RateLimited if status == 429 else Overloaded)(message, seconds_of(retry_after))
    return _ERRORS.get(status, BertologyError)(message)


def seconds_of(retry_after: str | None) -> float:
    """What ``Retry-After`` asks for, at most ``LONGEST_WAIT``; 1 where it names no number of seconds."""
    named = retry_after is not None and retry_after.isascii() and retry_after.isdigit()
    return min(float(retry_after), LONGEST_WAIT) if named and retry_after else 1.0


def lost(problem: httpx.TransportError, url: object, then: str = "check the address") -> BertologyError:
    """The error of a call that got no answer."""
    return BertologyError(f"no answer from {url}: {problem or type(problem).__name__}; {then}")


def headers_of(key: str | None) -> dict[str, str]:
    """What every call carries."""
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def answer_call(items: Iterable[JsonMapping], seconds: float | None) -> Call[tuple[Answer, ...]]:
    """Items of any deltas."""
    return Call("POST", "/predict", tuple[Answer, ...], list(items), _within(seconds))


def ask_many_call(deltas: Iterable[str], text: str | JsonMapping, seconds: float | None) -> Call[SeveralAnswers]:
    """One item for several deltas."""
    if isinstance(deltas, str):
        raise InputError(f"several deltas are asked, not {deltas!r}; expected a list of their names")
    record = {"text": text} if isinstance(text, str) else text
    body = {**record, "delta": None, "deltas": list(deltas)}
    return Call("POST", "/predict", SeveralAnswers, body, _within(seconds))


def _within(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"X-Request-Timeout-Ms": str(max(1, round(1e3 * seconds)))}


def items_of(delta: str, texts: Iterable[str | JsonMapping]) -> list[JsonObject]:
    """Texts, or records of the task's fields, as items for one delta."""
    return [{**({"text": text} if isinstance(text, str) else text), "delta": delta} for text in texts]


def vectors_of(answers: Sequence[Answer]) -> list[tuple[float, ...]]:
    """The embeddings of answers. InputError where a delta does not embed."""
    found = []
    for one in answers:
        if not isinstance(one.embedding, tuple):
            raise InputError(f"delta {one.delta!r} does {one.task}, not embeddings as numbers; ask another")
        found.append(one.embedding)
    return found


MODELS: Call[tuple[Model, ...]] = Call("GET", "/models", tuple[Model, ...])
READY: Call[dict[str, bool]] = Call("GET", "/v2/health/ready", dict[str, bool])
INDEX: Call[tuple[Version, ...]] = Call("POST", "/v2/repository/index", tuple[Version, ...])


def load_call(name: str, version: str | None) -> Call[Version]:
    """A swap."""
    body = None if version is None else {"parameters": {"version": version}}
    return Call("POST", f"/v2/repository/models/{name}/load", Version, body)


def unload_call(name: str) -> Call[Version]:
    """Taking away."""
    return Call("POST", f"/v2/repository/models/{name}/unload", Version)


class Client:
    """Asks one server. ``key`` is an API key; ``seconds`` is how long a call may take on the way and there together;
    ``retries`` how often a call is repeated that the server refused, naming a time, or that never reached it (a GET:
    that got no answer). Use it in a ``with``.

    Raises the errors of ``bertology_serve.errors`` that the server meant: NotFound, RateLimited, Expired ...
    """

    def __init__(self, url: str, key: str | None = None, seconds: float = 30.0, retries: int = 2) -> None:
        self._http = httpx.Client(base_url=url, headers=headers_of(key), timeout=seconds)
        self._retries = retries

    def ask(self, delta: str, text: str | JsonMapping, *, seconds: float | None = None) -> Answer:
        """One delta's answer to a text, or to a record of its task's fields (``question`` and ``context`` ...)."""
        return (self.answer(items_of(delta, [text]), seconds=seconds))[0]

    def answer(self, items: Iterable[JsonMapping], *, seconds: float | None = None) -> tuple[Answer, ...]:
        """The answers to items of any deltas, ``{"delta", "text", ...}``, in order.

        Expired is raised where they are not there within ``seconds``; what was still queued is then not computed.
        """
        return self._send(answer_call(items, seconds))

    def ask_many(
        self, deltas: Iterable[str], text: str | JsonMapping, *, seconds: float | None = None
    ) -> dict[str, Answer]:
        """Several deltas' answers to one text, by name; the server computes it once, as far as the deltas let it.

        Options that only some of their tasks take are for those.
        """
        return (self._send(ask_many_call(deltas, text, seconds))).deltas

    def embed(self, delta: str, texts: Sequence[str], *, seconds: float | None = None) -> list[tuple[float, ...]]:
        """The vectors of texts; ``base`` is the bare encoder."""
        return vectors_of(self.answer(items_of(delta, texts), seconds=seconds))

    def deltas(self) -> tuple[Model, ...]:
        """What answers."""
        return self._send(MODELS)

    def ready(self) -> bool:
        """Whether the server takes calls; false where there is none."""
        try:
            reply = self._reply(READY)
            return READY.read(reply.status_code, reply.content, None)["ready"]
        except (BertologyError, httpx.TransportError):
            return False

    def index(self) -> tuple[Version, ...]:
        """Every version on the server's disk or in its memory. Needs a key with admin rights, as what follows."""
        return self._send(INDEX)

    def load(self, delta: str, version: str | None = None) -> Version:
        """Makes a version answer; the newest where none is named."""
        return self._send(load_call(delta, version))

    def unload(self, delta: str) -> Version:
        """Takes a delta away."""
        return self._send(unload_call(delta))

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        left = self._retries
        while True:
            try:
                reply = self._reply(call)
            except httpx.TransportError as problem:
                call.check_unsent(problem, self._http.base_url)
                if not left:
                    raise lost(problem, self._http.base_url) from None
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
    """``Client`` for asyncio: the same methods, awaited. Use it in an ``async with``."""

    def __init__(self, url: str, key: str | None = None, seconds: float = 30.0, retries: int = 2) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=headers_of(key), timeout=seconds)
        self._retries = retries

    async def ask(self, delta: str, text: str | JsonMapping, *, seconds: float | None = None) -> Answer:
        return (await self.answer(items_of(delta, [text]), seconds=seconds))[0]

    async def answer(self, items: Iterable[JsonMapping], *, seconds: float | None = None) -> tuple[Answer, ...]:
        return await self._send(answer_call(items, seconds))

    async def ask_many(
        self, deltas: Iterable[str], text: str | JsonMapping, *, seconds: float | None = None
    ) -> dict[str, Answer]:
        return (await self._send(ask_many_call(deltas, text, seconds))).deltas

    async def embed(self, delta: str, texts: Sequence[str], *, seconds: float | None = None) -> list[tuple[float, ...]]:
        return vectors_of(await self.answer(items_of(delta, texts), seconds=seconds))

    async def deltas(self) -> tuple[Model, ...]:
        return await self._send(MODELS)

    async def ready(self) -> bool:
        try:
            reply = await self._reply(READY)
            return READY.read(reply.status_code, reply.content, None)["ready"]
        except (BertologyError, httpx.TransportError):
            return False

    async def index(self) -> tuple[Version, ...]:
        return await self._send(INDEX)

    async def load(self, delta: str, version: str | None = None) -> Version:
        return await self._send(load_call(delta, version))

    async def unload(self, delta: str) -> Version:
        return await self._send(unload_call(delta))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _send(self, call: Call[T]) -> T:
        left = self._retries
        while True:
            try:
                reply = await self._reply(call)
            except httpx.TransportError as problem:
                call.check_unsent(problem, self._http.base_url)
                if not left:
                    raise lost(problem, self._http.base_url) from None
            else:
                after = reply.headers.get("retry-after")
                wait = call.wait(reply.status_code, after)
                if wait is None or not left:
                    return call.read(reply.status_code, reply.content, after)
                await asyncio.sleep(wait)
            left -= 1

    async def _reply(self, call: Call[T]) -> httpx.Response:
        return await self._http.request(call.method, call.path, content=call.content, headers=call.headers)
