"""What a connection does beside uvicorn's: heads with their bodies, and who has hung up."""

from __future__ import annotations

import socket
from typing import Any

import httpx

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.serving.connection import Together
from bertology_serve.serving.prove.traffic import predict
from tests.serving.held import Held
from tests.serving.running import running, wait


class Transport:
    """Notes what is written, piece by piece as the system would get it."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def writelines(self, parts: Any) -> None:
        self.pieces.append(b"".join(parts))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


def test_a_head_goes_with_its_body():
    inner: Any = Transport()
    made = Together(inner)
    made.write(b"HTTP/1.1 200 OK\r\n\r\n")
    assert inner.pieces == []
    made.write(b"body")
    made.write(b"more")
    assert inner.pieces == [b"HTTP/1.1 200 OK\r\n\r\nbody", b"more"]


def test_a_head_without_a_body_goes_at_the_end():
    for end in (Together.flush, Together.close):
        inner: Any = Transport()
        made = Together(inner)
        made.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        end(made)
        end(made)
        assert inner.pieces == [b"HTTP/1.1 204 No Content\r\n\r\n"]


def test_who_is_told_to_go_on_hears_it_at_once():
    inner: Any = Transport()
    Together(inner).write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(inner.pieces) == 1


def test_nothing_is_written_to_a_line_that_was_cut():
    inner: Any = Transport()
    made = Together(inner)
    made.write(b"HTTP/1.1 200 OK\r\n\r\n")
    made.abort()
    made.close()
    assert inner.pieces == []


def heard(server: Any, sent: bytes, end: bytes) -> bytes:
    """What a server says to raw bytes, until it has said ``end``."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=20) as line:
        line.sendall(sent)
        found = b""
        while end not in found:
            found += line.recv(65_536)
    return found


def test_calls_in_one_piece_are_answered_one_after_the_other(server):
    one, other = predict("mood", "the cat"), predict("grade", "the dog")
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    found = heard(server, one + other + last, b"no such path")
    assert found.index(b'"delta":"mood"') < found.index(b'"delta":"grade"') < found.index(b"404 Not Found")


def test_a_body_in_pieces_and_one_that_waits_for_leave(server):
    call = predict("mood", "the cat").replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    found = heard(server, call, b"scores")
    assert found.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    pieces = iter([call[:-5], call[-5:]])
    assert server.client.post("/predict", content=(piece.split(b"\r\n\r\n")[-1] for piece in pieces)).is_success


def test_heads_alone_and_other_methods(server):
    response = server.client.head("/health")
    assert (response.status_code, response.content) == (200, b"")
    refused = server.client.put("/health")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "GET, HEAD" or refused.headers["allow"] == "HEAD, GET"
    assert refused.json() == {"error": "PUT is not for this path"}


def test_work_of_a_line_that_was_cut_is_dropped(pipeline: Pipeline):
    held: Any = Held(pipeline)
    with running(held) as started:
        url = httpx.URL(started.url)
        with socket.create_connection((url.host, url.port), timeout=20) as first:
            first.sendall(predict("mood", "first"))
            assert held.busy.wait(20)
            with socket.create_connection((url.host, url.port), timeout=20) as second:
                second.sendall(predict("mood", "second"))
                wait(lambda: started.server.engine.queue.items == 1)
            wait(lambda: started.server.engine.queue.items == 0)
            held.go.set()
            assert b"200 OK" in first.recv(65_536)
    assert held.texts == ["first"]


def test_calls_are_refused_unread_while_the_queue_is_full(pipeline: Pipeline):
    held: Any = Held(pipeline)
    with running(held, max_queue_tokens=8, max_item_tokens=8) as started:
        url = httpx.URL(started.url)
        with socket.create_connection((url.host, url.port), timeout=20) as first:
            first.sendall(predict("mood", "the"))
            assert held.busy.wait(20)
            with socket.create_connection((url.host, url.port), timeout=20) as second:
                second.sendall(predict("mood", ["the", "the dog was"]))
                wait(lambda: started.server.engine.queue.items == 2)
                assert started.post("/predict", {"delta": "mood", "text": "the"}).status_code == 503
                refused = started.post("/predict", b"this was never read")
                held.go.set()
                assert b"200 OK" in second.recv(65_536)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert started.post("/predict", b"and this was").status_code == 400
