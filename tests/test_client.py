"""Both clients against a running server, and every error that it can mean."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from bertology_serve.client import AsyncClient, Call, Client, problem_of
from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
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
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.tasks.redaction import restore
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.serving.running import Running, running

ADMIN = "an-admin-key-of-the-tests"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return tiny.encoder("bert", tmp_path_factory.mktemp("client") / "tiny")


@pytest.fixture(scope="module")
def server(encoder, tmp_path_factory) -> Iterator[Running]:
    root: Path = tmp_path_factory.mktemp("client") / "deltas"
    tasks = {
        "mood": TaskSpec("classification", ("bad", "good"), 32),
        "names": TaskSpec("token-classification", ("O", "B-LOC", "B-PER"), 32),
        "finder": TaskSpec("question-answering", max_length=24, stride=4),
    }
    for seed, (name, task) in enumerate(tasks.items()):
        delta = tiny.delta(encoder, name, [], task, seed)
        store.save(delta, root / name / "1", encoder.anatomy, encoder.config.to_dict())
    registry = Registry(Pipeline(encoder))
    registry.load(root)
    keys = [Key("admin", digest_of(ADMIN, ""), admin=True), Key("user", digest_of("user-" + ADMIN, ""))]
    with running(registry.pipeline, Keyring(keys), root) as started:
        yield started


def use(client: Client) -> list[Any]:
    """Every method once."""
    mood = client.ask("mood", "the cat")
    found = client.ask("finder", {"question": "who", "context": "Ada met the dog"}, seconds=20)
    both = client.answer([{"delta": "mood", "text": "the cat", "id": "a"}, {"delta": "names", "text": "Ada"}])
    many = client.ask_many(["mood", "names"], "the cat")
    vectors = client.embed("base", ["the cat", "a dog"])
    models = client.deltas()
    client.unload("mood")
    states = {one.name: one.state for one in client.index()}
    again = client.load("mood", "1")
    return [mood, found, both, many, vectors, models, states, again, client.ready()]


async def use_async(client: AsyncClient) -> list[Any]:
    mood = await client.ask("mood", "the cat")
    found = await client.ask("finder", {"question": "who", "context": "Ada met the dog"}, seconds=20)
    both = await client.answer([{"delta": "mood", "text": "the cat", "id": "a"}, {"delta": "names", "text": "Ada"}])
    many = await client.ask_many(["mood", "names"], "the cat")
    vectors = await client.embed("base", ["the cat", "a dog"])
    models = await client.deltas()
    await client.unload("mood")
    states = {one.name: one.state for one in await client.index()}
    again = await client.load("mood", "1")
    return [mood, found, both, many, vectors, models, states, again, await client.ready()]


def test_both_clients_say_the_same(server):
    with Client(server.url, ADMIN) as client:
        one = use(client)

    async def go() -> list[Any]:
        async with AsyncClient(server.url, ADMIN) as client:
            return await use_async(client)

    assert asyncio.run(go()) == one
    mood, found, both, many, vectors, models, states, again, ready = one
    assert mood.label in ("bad", "good")
    assert mood.scores[mood.label] == mood.score
    assert (list(many), many["mood"].label, many["names"].task) == (["mood", "names"], mood.label, both[1].task)
    assert found.answer.text in "Ada met the dog"
    assert (both[0].id, both[0].version, both[1].task) == ("a", "1", "token-classification")
    assert all(entity.label in ("LOC", "PER") for entity in both[1].entities)
    assert [len(vector) for vector in vectors] == [32, 32]
    assert {model.name for model in models} == {"base", "mood", "names", "finder"}
    assert states["mood"] == "UNAVAILABLE"
    assert again.state == "READY"
    assert ready


def test_what_an_item_may_ask_beside_its_text_is_typed_too(server):
    with Client(server.url, ADMIN) as client:
        text = "\U0001f600 Ada met bob@x.org"
        found = client.ask("names", {"text": text, "redact": "replace", "patterns": "replace", "offsets": "utf16"})
        parts = client.ask("base", {"text": text, "pooling": "chunks", "chunk_tokens": 2})
        bits = client.ask("base", {"text": text, "encoding_format": "ubinary", "dimensions": 16})
    assert restore(found.redacted, found.placeholders) == text
    assert found.redactions[-1].end_utf16 == found.redactions[-1].end + 1 == len(text) + 1
    assert [len(chunk.embedding) for chunk in parts.chunks] == [32] * len(parts.chunks)
    assert len(bits.embedding) == 2


def test_the_delta_that_is_asked_answers(server):
    """Whatever the record says, as one of /predict does."""
    with Client(server.url, ADMIN) as client:
        record = {"text": "the cat", "delta": "names", "deltas": None}
        assert client.ask("mood", record).delta == "mood"
        assert {name: one.delta for name, one in client.ask_many(["mood", "base"], record).items()} == {
            "mood": "mood",
            "base": "base",
        }
        both = client.ask_many(["mood", "names"], {"text": "Ada", "redact": "replace"})
        assert both["mood"].label
        with pytest.raises(InputError, match="expected a list of their names"):
            client.ask_many("mood", "a")


def test_the_two_have_the_same_methods():
    def methods(kind: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(method))
            for name, method in vars(kind).items()
            if callable(method) and not name.startswith("_")
        }

    sync, aio = methods(Client), methods(AsyncClient)
    assert aio.pop("aclose") == sync.pop("close")
    assert sync == aio


@pytest.mark.parametrize(
    ("key", "do", "error", "message"),
    [
        (None, lambda c: c.ask("mood", "a"), Unauthorized, "no valid API key"),
        ("user-" + ADMIN, lambda c: c.load("mood"), Forbidden, "admin rights"),
        (ADMIN, lambda c: c.ask("moot", "a"), NotFound, "no delta 'moot'"),
        (ADMIN, lambda c: c.ask("mood", ""), InputError, "field 'text' is empty"),
        (ADMIN, lambda c: c.ask("mood", "a" * 100_001), LimitError, "100000"),
        (ADMIN, lambda c: c.embed("mood", ["a"]), InputError, "does classification, not embeddings"),
    ],
)
def test_errors_are_the_server_s(server, key, do: Callable[[Client], Any], error, message):
    with Client(server.url, key) as client, pytest.raises(error, match=message):
        do(client)


@pytest.mark.parametrize(
    ("status", "content", "after", "error", "message"),
    [
        (429, b'{"error": "slowly"}', "3", RateLimited, "slowly"),
        (503, b'{"error": "full"}', None, Overloaded, "full"),
        (504, b'{"error": "late"}', None, Expired, "late"),
        (500, b'{"error": "fault"}', None, BertologyError, "fault"),
        (502, b"<html>", None, BertologyError, "the server answered 502"),
        (418, b"[]", None, BertologyError, "the server answered 418"),
    ],
)
def test_errors_by_status(status, content, after, error, message):
    problem = problem_of(status, content, after)
    assert type(problem) is error
    assert message in str(problem)
    if isinstance(problem, Overloaded):
        assert problem.retry_after == (3.0 if after else 1.0)


def test_another_server_is_told_apart():
    with pytest.raises(BertologyError, match="no answer of bertology-serve"):
        asked(Replies(httpx.Response(200, text="hello")), "deltas", False)


class Replies:
    """What a server does, call by call: an answer, or how the connection ends. ``asked`` counts the calls."""

    def __init__(self, *replies: httpx.Response | type[Exception]) -> None:
        self.replies, self.asked = list(replies), 0

    def next(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        reply = self.replies.pop(0)
        if isinstance(reply, httpx.Response):
            return reply
        raise reply("as asked for")

    async def next_async(self, request: httpx.Request) -> httpx.Response:
        return self.next(request)


def asked(replies: Replies, do: str, aio: bool) -> Any:
    """What a client of either kind makes of them: ``do`` is a method that takes nothing but items."""
    if not aio:
        with Client("http://x") as client:
            client._http.close()
            client._http = httpx.Client(base_url="http://x", transport=httpx.MockTransport(replies.next))
            return client.answer([]) if do == "answer" else getattr(client, do)()

    async def go() -> Any:
        async with AsyncClient("http://x") as client:
            await client._http.aclose()
            transport = httpx.MockTransport(replies.next_async)
            client._http = httpx.AsyncClient(base_url="http://x", transport=transport)
            return await (client.answer([]) if do == "answer" else getattr(client, do)())

    return asyncio.run(go())


BEGUN = [httpx.ReadTimeout, httpx.WriteTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError]
NEVER_SENT = [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout]


@pytest.mark.parametrize("aio", [False, True])
@pytest.mark.parametrize("ends", BEGUN)
def test_what_the_server_may_have_begun_is_not_sent_again(ends, aio):
    for do in ("answer", "index"):  # both are POSTs
        replies = Replies(ends, httpx.Response(200, json=[]))
        with pytest.raises(BertologyError, match=r"no answer from http://x.* it may have been computed"):
            asked(replies, do, aio)
        assert replies.asked == 1
    replies = Replies(ends, ends, httpx.Response(200, json=[]))
    assert asked(replies, "deltas", aio) == ()  # a GET changes nothing
    assert replies.asked == 3


@pytest.mark.parametrize("aio", [False, True])
@pytest.mark.parametrize("ends", NEVER_SENT)
def test_what_never_reached_the_server_is_sent_again(ends, aio):
    replies = Replies(ends, ends, httpx.Response(200, json=[]))
    assert asked(replies, "answer", aio) == ()
    replies = Replies(ends, ends, ends)
    with pytest.raises(BertologyError, match=r"no answer from http://x.*; check the address"):
        asked(replies, "answer", aio)
    assert replies.asked == 3


@pytest.mark.parametrize("aio", [False, True])
@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_repeated_where_it_names_a_time_and_no_other_reply_is(status, aio, monkeypatch):
    waits: list[float] = []

    async def nap(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("bertology_serve.client.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr("bertology_serve.client.asyncio", SimpleNamespace(sleep=nap))
    named = httpx.Response(status, headers={"Retry-After": "2"}, json={"error": "full"})
    assert asked(Replies(named, named, httpx.Response(200, json=[])), "answer", aio) == ()
    assert waits == [2.0, 2.0]
    bare = Replies(httpx.Response(status, json={"error": "full"}))
    with pytest.raises(Overloaded, match="full"):
        asked(bare, "answer", aio)
    for other in (500, 502, 504):
        with pytest.raises(BertologyError):
            asked(Replies(httpx.Response(other, headers={"Retry-After": "2"})), "answer", aio)
    assert waits == [2.0, 2.0]


@pytest.mark.parametrize(
    ("after", "seconds"),
    [("0", 0.0), ("7", 7.0), ("60", 60.0), ("61", 60.0), ("86400", 60.0), ("9" * 400, 60.0), ("-1", 1.0), ("1.5", 1.0),
     ("", 1.0), (None, 1.0), ("٣", 1.0), ("²", 1.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)],
)  # fmt: skip
def test_retry_after_is_taken_up_to_a_minute(after, seconds):
    problem = problem_of(503, b"{}", after)
    assert isinstance(problem, Overloaded)
    assert problem.retry_after == seconds
    assert Call("GET", "/x", int).wait(429, after) == seconds


def test_no_server_at_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

        async def go() -> None:
            async with AsyncClient(url, retries=1) as client:
                assert not await client.ready()
                with pytest.raises(BertologyError, match=r"no answer from http://127\.0\.0\.1"):
                    await client.deltas()

        asyncio.run(go())


def test_a_call_is_data():
    assert Call("GET", "/x", int).content is None
    assert Call("GET", "/x", int, {"a": 1}).content == b'{"a":1}'
