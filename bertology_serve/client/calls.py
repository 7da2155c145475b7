"""What the two clients share: calls as data, replies as typed answers or as the errors that the server meant.

What the server may have begun is not sent again: to compute it twice helps nobody, least of all a server that is too
slow. Repeated are calls that it refused and named a time for (429 and 503 with ``Retry-After``), those that never
reached it because there was no connection, and GETs, which change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
from bertology_serve.tasks.answers import Answer, Model, SeveralAnswers, Version

if TYPE_CHECKING:
    from bertology_serve.files import JsonMapping, JsonObject

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
        """The body's bytes."""
        return None if self.body is None else msgspec.json.encode(self.body)

    def read(self, status: int, content: bytes, retry_after: str | None) -> T:
        """The reply, or the error that it tells of."""
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


def answer(items: Iterable[JsonMapping], seconds: float | None) -> Call[tuple[Answer, ...]]:
    """Items of any deltas."""
    return Call("POST", "/predict", tuple[Answer, ...], list(items), _within(seconds))


def ask_many(deltas: Iterable[str], text: str | JsonMapping, seconds: float | None) -> Call[SeveralAnswers]:
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


def models() -> Call[tuple[Model, ...]]:
    """The deltas that answer."""
    return Call("GET", "/models", tuple[Model, ...])


def ready() -> Call[dict[str, bool]]:
    """Readiness."""
    return Call("GET", "/v2/health/ready", dict[str, bool])


def index() -> Call[tuple[Version, ...]]:
    """Every version."""
    return Call("POST", "/v2/repository/index", tuple[Version, ...])


def load(name: str, version: str | None) -> Call[Version]:
    """A swap."""
    body = None if version is None else {"parameters": {"version": version}}
    return Call("POST", f"/v2/repository/models/{name}/load", Version, body)


def unload(name: str) -> Call[Version]:
    """Taking away."""
    return Call("POST", f"/v2/repository/models/{name}/unload", Version)
