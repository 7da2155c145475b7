"""Calls that wait: deadlines, priorities, full queues, clients that leave, over a real socket."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest

from tests.serving.held import Held
from tests.serving.running import Running, running, wait


def test_a_full_queue_is_a_503_with_retry_after(pipeline):
    held = Held(pipeline)
    with running(held, max_queue_tokens=8, max_item_tokens=8) as server:
        threads = [threading.Thread(target=send, args=(server, "the cat")) for _ in range(3)]
        queue = server.server.service.queue
        for number, thread in enumerate(threads):
            thread.start()
            assert held.busy.wait(20)  # the first is with the executor
            wait(lambda number=number: queue.items == number)
        response = server.post("/predict", {"delta": "mood", "text": "a dog"})
        held.go.set()
        for thread in threads:
            thread.join(120)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "the queue is full" in response.json()["error"]
        assert held.texts == ["the cat"] * 3


def send(server: Running, text: str) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", json={"delta": "mood", "text": text}, timeout=120)


def test_who_hangs_up_costs_nothing(pipeline):
    held = Held(pipeline)
    with running(held) as server:
        first = threading.Thread(target=send, args=(server, "first"))
        first.start()
        queue = server.server.service.queue
        assert held.busy.wait(20)
        body = b'{"delta": "mood", "text": "gone"}'
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as left:
            left.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait(lambda: queue.items >= 1)
        wait(lambda: queue.items == 0)
        held.go.set()
        first.join(120)
        assert held.texts == ["first"]


INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["late"]}]}


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/predict", {"delta": "mood", "text": "late"}, {"X-Request-Timeout-Ms": "20"}),
        ("/models/mood", {"inputs": "late"}, {"X-Request-Timeout-Ms": "20"}),
        ("/v2/models/mood/infer", INFER, {"X-Request-Timeout-Ms": "20"}),
        ("/v2/models/mood/infer", INFER | {"parameters": {"timeout": 20_000}}, {}),
    ],
)
def test_a_caller_may_set_a_deadline(pipeline, path, body, headers):
    held = Held(pipeline)
    with running(held) as server:
        first = threading.Thread(target=send, args=(server, "first"))
        first.start()
        assert held.busy.wait(20)
        response = server.client.post(path, json=body, headers=headers)
        assert (response.status_code, response.json()) == (
            504,
            {"error": "no answer within 0.02 s; send less, later, or allow more time"},
        )
        held.go.set()
        first.join(120)
        assert held.texts == ["first"]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "9" * 30])
def test_deadlines_that_make_no_sense(server, value):
    headers = {"X-Request-Timeout-Ms": value}
    response = server.client.post("/predict", json={"delta": "mood", "text": "cat"}, headers=headers)
    assert response.status_code == 400
    assert "expected a whole number of milliseconds" in response.json()["error"]
    infer = INFER | {"parameters": {"timeout": value}}
    assert server.post("/v2/models/mood/infer", infer).status_code == 400


def test_a_deadline_beyond_all_numbers_is_none(server):
    for timeout in (0, 2**63, 10**17):
        assert server.post("/v2/models/mood/infer", INFER | {"parameters": {"timeout": timeout}}).status_code == 200


def test_a_full_queue_of_one_delta_is_a_429_with_retry_after(pipeline):
    held = Held(pipeline)
    with running(held, max_delta_tokens=8, max_item_tokens=8) as server:
        threads = [threading.Thread(target=send, args=(server, "the cat")) for _ in range(3)]
        queue = server.server.service.queue
        for number, thread in enumerate(threads):
            thread.start()
            assert held.busy.wait(20)
            wait(lambda number=number: queue.items == number)
        response = server.post("/predict", {"delta": "mood", "text": "a dog"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        other = threading.Thread(target=server.post, args=("/predict", {"delta": "sense", "text": "a dog"}))
        other.start()
        wait(lambda: queue.items == 3)
        held.go.set()
        for thread in (*threads, other):
            thread.join(120)


def test_readiness_and_answers_while_draining(pipeline):
    held = Held(pipeline)
    with running(held, drain_seconds=0.5) as server:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(send(server, "the cat")))
        thread.start()
        assert held.busy.wait(20)
        server.server.drain()
        assert server.client.get("/v2/health/ready").status_code == 503
        assert server.client.get("/v2/models/mood/ready").status_code == 503
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/health").json() == {"status": "draining"}
        held.go.set()
        assert server.post("/predict", {"delta": "mood", "text": "a dog"}).status_code == 200
        thread.join(120)
        assert accepted[0].status_code == 200
        wait(lambda: server.server.should_exit)


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "9" * 12])
def test_priorities_that_make_no_sense(server, value):
    headers = {"X-Request-Priority": value}
    response = server.client.post("/predict", json={"delta": "mood", "text": "cat"}, headers=headers)
    assert response.status_code == 400
    assert "1 goes first" in response.json()["error"]
    assert server.post("/v2/models/mood/infer", INFER | {"parameters": {"priority": value}}).status_code == 400


def test_what_is_urgent_goes_first_and_a_full_queue_is_told_before_tokenising(pipeline, monkeypatch):
    held = Held(pipeline)
    with running(held, max_queue_tokens=8, max_item_tokens=8) as server:
        queue = server.server.service.queue

        def ask(text: str, **headers: str) -> threading.Thread:
            call = lambda: server.client.post("/predict", json={"delta": "mood", "text": text}, headers=headers)  # noqa: E731
            thread = threading.Thread(target=call)
            thread.start()
            return thread

        threads = [ask("first")]
        assert held.busy.wait(20)
        threads.append(ask("patient"))
        wait(lambda: queue.items == 1)
        server.server.service.queue.times.budget = 1
        queue._scheduler.max_tokens = 1
        threads.append(ask("urgent", **{"X-Request-Priority": "1"}))
        wait(lambda: queue.items == 2)
        with monkeypatch.context() as patch:
            patch.setattr(queue, "max_tokens", queue.tokens)
            patch.setattr(held, "prepare", lambda request: pytest.fail("tokenised in vain"), raising=False)
            assert server.post("/predict", {"delta": "mood", "text": "late"}).status_code == 503
        held.go.set()
        for thread in threads:
            thread.join(120)
        assert held.texts[0] == "first"
        assert held.texts.index("urgent") < held.texts.index("patient")
