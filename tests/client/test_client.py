"""Both clients against a running server, and every error that it can mean."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.client import AsyncClient, Client
from bertology_serve.client.calls import Call, problem_of
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
from bertology_serve.serving.registry import Registry
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
    vectors = client.embed("base", ["the cat", "a dog"])
    models = client.deltas()
    client.unload("mood")
    states = {one.name: one.state for one in client.index()}
    again = client.load("mood", "1")
    return [mood, found, both, vectors, models, states, again, client.ready()]


async def use_async(client: AsyncClient) -> list[Any]:
    mood = await client.ask("mood", "the cat")
    found = await client.ask("finder", {"question": "who", "context": "Ada met the dog"}, seconds=20)
    both = await client.answer([{"delta": "mood", "text": "the cat", "id": "a"}, {"delta": "names", "text": "Ada"}])
    vectors = await client.embed("base", ["the cat", "a dog"])
    models = await client.deltas()
    await client.unload("mood")
    states = {one.name: one.state for one in await client.index()}
    again = await client.load("mood", "1")
    return [mood, found, both, vectors, models, states, again, await client.ready()]


def test_both_clients_say_the_same(server):
    with Client(server.url, ADMIN) as client:
        one = use(client)

    async def go() -> list[Any]:
        async with AsyncClient(server.url, ADMIN) as client:
            return await use_async(client)

    assert asyncio.run(go()) == one
    mood, found, both, vectors, models, states, again, ready = one
    assert mood.label in ("bad", "good")
    assert mood.scores[mood.label] == mood.score
    assert found.answer.text in "Ada met the dog"
    assert (both[0].id, both[0].version, both[1].task) == ("a", "1", "token-classification")
    assert all(entity.label in ("LOC", "PER") for entity in both[1].entities)
    assert [len(vector) for vector in vectors] == [32, 32]
    assert {model.name for model in models} == {"base", "mood", "names", "finder"}
    assert states["mood"] == "UNAVAILABLE"
    assert again.state == "READY"
    assert ready


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


def test_a_full_server_is_asked_again_and_an_absent_one_is_named(monkeypatch):
    waits: list[float] = []
    replies = [httpx.Response(503, headers={"Retry-After": "2"}, json={"error": "full"})] * 2
    replies += [httpx.Response(200, json=[]), httpx.Response(200, text="hello")]

    def reply(request: httpx.Request) -> httpx.Response:
        return replies.pop(0)

    monkeypatch.setattr("bertology_serve.client.sync.time.sleep", waits.append)
    with Client("http://x") as client:
        client._http.close()
        client._http = httpx.Client(base_url="http://x", transport=httpx.MockTransport(reply))
        assert client.answer([]) == ()
        assert waits == [2.0, 2.0]
        with pytest.raises(BertologyError, match="no answer of bertology-serve"):
            client.deltas()
        replies += [httpx.Response(503, json={"error": "full"})] * 3
        with pytest.raises(Overloaded):
            client.deltas()


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
