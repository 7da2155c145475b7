"""What one connection lets a client do: raw bytes over a real socket, against an application that says what it got."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import Mock

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from bertology_serve.bench.prove.traffic import predict
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.serving.http import connection
from bertology_serve.serving.http.connection import CONNECTION, Connection, Crowd, limited
from tests.serving.held import Held
from tests.serving.running import running, wait

try:
    import uvloop
except ImportError:  # not for Windows
    uvloop = None  # type: ignore[assignment]

T = TypeVar("T")
HEAD = b"GET /a HTTP/1.1\r\nHost: x\r\n"
PATIENCE = 20.0


def everywhere(run: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What a coroutine gives, which it must on every event loop that the server may run on."""
    found = []
    for factory in (None, uvloop.new_event_loop if uvloop else None):
        with asyncio.Runner(loop_factory=factory) as runner:
            found.append(runner.run(run()))
    return found[-1]


@dataclass
class Line:
    """A client's end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, *pieces: bytes) -> None:
        """Sends pieces, each in a packet of its own as far as that can be had."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0.002)

    async def rest(self) -> bytes:
        """All that comes until the other side hangs up, however it does."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while True:
                piece = await asyncio.wait_for(self.reader.read(65_536), PATIENCE)
                if not piece:
                    break
                found += piece
        return found

    async def until(self, end: bytes) -> bytes:
        """What comes, up to and with these bytes."""
        return await asyncio.wait_for(self.reader.readuntil(end), PATIENCE)


class House:
    """A server of one connection class, and what its application was asked."""

    def __init__(self, kind: type[Connection], port: int, state: ServerState) -> None:
        self.kind, self.port, self.state = kind, port, state
        self.lines: list[Line] = []

    async def line(self) -> Line:
        """Another connection."""
        self.lines.append(Line(*await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)))
        return self.lines[-1]

    async def empty(self) -> None:
        """Waits until no connection and no task is left."""
        async with asyncio.timeout(PATIENCE):
            while len(self.kind.crowd) or self.state.connections or self.state.tasks:
                await asyncio.sleep(0.005)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path and the size of the body. /unread does not look at that; /long answers 4 MiB."""
    size, more = 0, not scope["path"].startswith("/unread")
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    body = json.dumps({"path": scope["path"], "size": size}).encode()
    if scope["path"] == "/long":
        body = b"x" * 2**22
    headers = [(b"content-length", b"%d" % len(body))] if scope["path"] != "/streamed" else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def house(app: Any = echo, most: int = 100, **bounds: Any) -> AsyncIterator[House]:
    """A server on a free port."""
    kind = limited(**{"max_head": 2000, "max_body": 65_536, "max_seconds": PATIENCE, "most": most, **bounds})
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    config = SimpleNamespace(loaded_app=app)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: kind(config, state), "127.0.0.1", 0)
    made = House(kind, listening.sockets[0].getsockname()[1], state)
    try:
        yield made
    finally:
        listening.close()
        for line in made.lines:
            line.writer.close()
            with contextlib.suppress(ConnectionError):
                await line.writer.wait_closed()
        for one in list(state.connections):
            one.cut()  # type: ignore[attr-defined]
        await asyncio.sleep(0)


def asked(*pieces: bytes, app: Any = echo, **bounds: Any) -> bytes:
    """All that a server says to these bytes, on a connection that it ends."""

    async def run() -> bytes:
        async with house(app, **bounds) as made:
            line = await made.line()
            await line.say(*pieces)
            found = await line.rest()
            line.writer.close()
            await made.empty()
            return found

    return everywhere(run)


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def echoed(answers: bytes) -> list[Any]:
    return [json.loads(body) for body in re.findall(rb"\{\"path[^}]*\}", answers)]


LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"


@pytest.mark.parametrize("framing", ["length", "chunked", "none"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_call_that_offers_another_protocol_keeps_its_body(framing, pieces):
    head = b"POST /a HTTP/1.1\r\nHost: x\r\n" + UPGRADE
    head += {"length": b"Content-Length: 5\r\n", "chunked": b"Transfer-Encoding: chunked\r\n", "none": b""}[framing]
    body = {"length": b"hello", "chunked": b"5\r\nhello\r\n0\r\n\r\n", "none": b""}[framing]
    parts = [head + b"\r\n", body + LAST] if pieces == 2 else [head + b"\r\n" + body + LAST]
    size = 0 if framing == "none" else 5
    assert echoed(asked(*parts)) == [{"path": "/a", "size": size}, {"path": "/last", "size": 0}]


def test_a_refusal_waits_for_the_answers_before_it():
    body = b"x" * 5000
    first = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert statuses(asked(first + b"GET /last HT", LAST[12:])) == [200, 200]  # its end is no large head
    assert statuses(asked(first + HEAD + b"X: " + b"x" * 9000)) == [200, 431]
    assert statuses(asked(first + b"nonsense\r\n\r\n")) == [200, 400]
    assert statuses(asked(LAST + b"nonsense\r\n\r\n")) == [200]  # nothing follows a call that ends the connection


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /a HTTP/1.1\r\n\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        (b"GET /a HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /a HTTP/1.0\r\n\r\n", 200),
        (b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /a HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
        (b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    ],
)  # fmt: skip
def test_heads_that_are_taken_and_those_that_are_not(head, status):
    assert statuses(asked(head)) == [status]
    assert statuses(asked(HEAD + b"\r\n" + head)) == [200, status]


REFUSED_HEADS = {
    "two lengths": (b"POST /a HTTP/1.1\r\n%sHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    "no path": (b"GET http://x HTTP/1.1\r\n%sHost: x\r\n\r\n", 400),
    "too many fields": (b"GET /a HTTP/1.1\r\n%sHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    "too large": (b"GET /a HTTP/1.1\r\n%sHost: x\r\nA: " + b"b" * 20_000 + b"\r\n\r\n", 431),
}


@pytest.mark.parametrize("what", REFUSED_HEADS)
def test_a_refusal_has_the_headers_of_every_answer_and_the_id_of_its_call(what):
    head, status = REFUSED_HEADS[what]
    before = HEAD + b"X-Request-Id: another\r\n\r\n"
    for field, found in ((b"X-Request-Id: call-7\r\n", b"call-7"), (b"X-Request-Id: a b<\r\n", b"[0-9a-f]{32}")):
        for sent in (head % field, before + head % field):
            answer = asked(sent)[-1000:].rpartition(b"HTTP/1.1 ")[2]
            assert answer.startswith(b"%d " % status)
            assert re.search(b"\r\nx-request-id: " + found + b"\r\n", answer), answer
            assert b"\r\ndate: today\r\n" in answer
    junk = asked(before + b"\x16\x03\x01").rpartition(b"HTTP/1.1 ")[2]
    assert re.search(b"\r\nx-request-id: [0-9a-f]{32}\r\n", junk), "what is no call has no id of another's"


ENDLESS = {
    "a head": (HEAD, b"X-Long: x\r\n"),
    "a field": (HEAD + b"X: ", b"x" * 1000),
    "a target": (b"GET /", b"x" * 1000),
    "a body": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n", b"x" * 1000),
    "chunks": (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 100),
    "an extension": (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x" * 1000),
    "trailers": (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 100),
    "an unread body": (b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n", b"x" * 1000),
    "unread chunks": (b"POST /unread HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 100),
    "unread trailers": (
        b"POST /unread HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 100,
    ),
    "more after the end": (LAST, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50),
    "more after a refusal": (b"nonsense\r\n\r\n", b"x" * 1000),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_cut_off(what):
    """By bytes: the clocks are far away."""
    start, piece = ENDLESS[what]

    def send(port: int) -> int:
        sent = 0
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as line:
            line.sendall(start)
            with contextlib.suppress(ConnectionError):
                while sent < 20_000_000:
                    line.sendall(piece)
                    sent += len(piece)
        return sent

    async def run() -> int:
        async with house(refusing) as made:
            sent = await asyncio.to_thread(send, made.port)
            await made.empty()
        return sent

    assert everywhere(run) < 20_000_000  # some 100 KiB are taken; the rest lay in the system's buffers


async def refusing(scope: Any, receive: Any, send: Any) -> None:
    """As the server does: a body beyond 64 KiB is not taken."""
    size, more = 0, not scope["path"].startswith("/unread")
    while more and size <= 65_536:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 413 if more else 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


def test_who_sends_too_much_is_told_so():
    """A client that writes all of a body before it reads must not find its connection reset."""
    body = b"x" * 250_000

    def send(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as line:
            line.sendall(b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            for at in range(0, len(body), 1000):
                line.sendall(body[at : at + 1000])
            return line.recv(1000)

    async def run() -> None:
        async with house(refusing) as made:
            assert statuses(await asyncio.to_thread(send, made.port)) == [413]
            await made.empty()

    everywhere(run)


def test_the_fields_of_trailers_are_forgotten():
    call = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n"

    async def run() -> None:
        async with house() as made:
            line = await made.line()
            await line.say(call + b"a: b\r\n" * 1000)
            (one,) = made.state.connections
            assert len(one._headers) == 2  # type: ignore[attr-defined]
            await line.say(b"\r\n" + LAST)
            assert echoed(await line.rest()) == [{"path": "/a", "size": 2}, {"path": "/last", "size": 0}]

    everywhere(run)


HELD = {
    "nothing": b"",
    "a line break": b"\r\n",
    "half a head": HEAD,
    "a head without its body": b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    "half a chunk": b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nx",
    "half a trailer": b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na",
    "an answer": HEAD + b"\r\n",
    "an answer and a line break": HEAD + b"\r\n\r\n",
    "an answer and half a head": HEAD + b"\r\n" + HEAD,
    "an answer without the body": b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    "an answer without a long body": b"POST /unread HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n{",
    "an answer without the chunks": b"POST /unread HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "an offer": b"GET /a HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\nx",
    "a refusal": b"nonsense\r\n\r\n",
    "the end": LAST,
}


def test_every_state_has_a_clock(monkeypatch):
    """A client that sends one byte more after a while, and never hangs up, is hung up on."""
    monkeypatch.setattr(connection, "GRACE", 0.0)

    async def one(made: House, sent: bytes) -> None:
        line = await made.line()
        await line.say(sent)
        await asyncio.sleep(0.1)
        with contextlib.suppress(ConnectionError):
            await line.say(b"\r\n")
        await line.rest()

    async def run() -> None:
        async with house(max_seconds=0.3, keep_alive=0.5) as made:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(one(made, sent) for sent in HELD.values()))
            await made.empty()

    everywhere(run)


def test_who_does_not_read_the_answer_is_hung_up_on():
    async def run() -> None:
        async with house(max_seconds=0.3) as made:
            with socket.create_connection(("127.0.0.1", made.port)) as deaf:
                deaf.setblocking(False)
                await asyncio.get_running_loop().sock_sendall(deaf, b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n" * 8)
                await asyncio.sleep(0.05)
                await made.empty()

    everywhere(run)


def test_who_reads_a_long_answer_slowly_gets_all_of_it():
    async def run() -> None:
        async with house(max_seconds=1.0) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port, limit=1024)
            writer.write(LAST.replace(b"/last", b"/long"))
            size = 0
            while piece := await reader.read(65_536):
                size += len(piece)
                await asyncio.sleep(0.02)
            writer.close()
            assert size > 2**22

    everywhere(run)


def test_answers_of_unknown_size_come_in_chunks():
    body = b'{"path": "/streamed", "size": 0}'
    found = asked(LAST.replace(b"/last", b"/streamed"))
    assert b"transfer-encoding: chunked\r\n" in found
    assert found.endswith(b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert asked(b"GET /streamed HTTP/1.0\r\n\r\n").endswith(b"connection: close\r\n\r\n" + body)


def test_an_application_that_fails_is_500_without_its_words(caplog):
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a secret")

    found = asked(HEAD + b"\r\n", app=broken)
    assert statuses(found) == [500]
    assert b"secret" not in found
    assert "secret" not in caplog.text
    assert "ValueError" in caplog.text


def test_a_header_with_a_line_break_is_not_sent():
    async def split(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\r\nset-cookie: b")]})

    assert statuses(asked(HEAD + b"\r\n", app=split)) == [500]


def test_many_calls_in_one_piece_wait_unparsed():
    async def run() -> None:
        go = asyncio.Event()

        async def held(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            await echo(scope, receive, send)

        async with house(held) as made:
            line = await made.line()
            await line.say((HEAD + b"\r\n") * 2000 + LAST)
            await asyncio.sleep(0.05)
            (one,) = made.state.connections
            assert len(one._waiting) < 4096 / len(HEAD)  # type: ignore[attr-defined]
            go.set()
            assert len(echoed(await line.rest())) == 2001

    everywhere(run)


def test_a_newcomer_takes_the_place_of_who_rests_and_showed_no_key():
    async def run() -> None:
        go = asyncio.Event()

        async def keyed(scope: Any, receive: Any, send: Any) -> None:
            scope[CONNECTION].known = scope["path"] != "/a"
            if scope["path"] == "/held":
                await go.wait()
            await echo(scope, receive, send)

        async with house(keyed, most=4) as made:
            known, busy, stranger, half = [await made.line() for _ in range(4)]
            await known.say(HEAD.replace(b"/a", b"/known") + b"\r\n")
            await known.until(b"}")
            await busy.say(HEAD.replace(b"/a", b"/held") + b"\r\n")
            await stranger.say(HEAD + b"\r\n")
            await stranger.until(b"}")
            await half.say(HEAD)
            newcomers = []
            for gone in (stranger, half):
                newcomers.append(await made.line())
                await newcomers[-1].say(HEAD.replace(b"/a", b"/new") + b"\r\n")
                await newcomers[-1].until(b"}")
                assert await gone.rest() == b""
            last = await made.line()  # now those that rest have all shown a key: the eldest goes
            await last.say(HEAD + b"\r\n")
            await last.until(b"}")
            assert await known.rest() == b""
            go.set()
            assert b"/held" in await busy.until(b"}")
            assert len(made.kind.crowd) == 4

    everywhere(run)


def test_where_all_are_being_answered_a_newcomer_is_cut_off():
    crowd = Crowd(1)
    busy, newcomer = Mock(can_go=False), Mock()
    crowd.enter(busy)
    crowd.enter(newcomer)
    assert len(crowd) == 1
    newcomer.cut.assert_called_once()


@st.composite
def calls(draw: Any) -> tuple[bytes, str, int]:
    """The bytes of a whole call, its path, and the size of the body that the application is told."""
    path = draw(st.sampled_from(["/a", "/b%20c", "/unread", "/streamed"]))
    body = draw(st.binary(max_size=20)) * draw(st.sampled_from([1, 1, 1, 500]))
    framing = draw(st.sampled_from(["none", "length", "chunked"]))
    head = b"%s %s HTTP/1.1\r\nHost: x\r\n" % (b"GET" if framing == "none" else b"POST", path.encode())
    head += draw(st.sampled_from([b"", b"", UPGRADE, b"X-More: y\r\n" * 30]))
    if framing == "none":
        head, body = head + b"\r\n", b""
    elif framing == "length":
        head += b"Content-Length: %d\r\n\r\n" % len(body)
    else:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
    sent = body
    if framing == "chunked":
        step = draw(st.integers(1, 300)) if len(body) < 400 else 300
        extension = draw(st.sampled_from([b"", b";a=b"]))
        parts = [body[at : at + step] for at in range(0, len(body), step)]
        sent = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
        sent += b"0\r\n" + draw(st.sampled_from([b"", b"T: u\r\n"])) + b"\r\n"
    return head + sent, path, 0 if path == "/unread" else len(body)


@given(
    streams=st.lists(
        st.tuples(
            st.lists(calls(), min_size=1, max_size=4),
            st.lists(st.integers(1, 3000), max_size=6),
            st.one_of(st.none(), st.floats(0, 1)),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=30, deadline=None)
def test_any_stream_of_calls_is_answered_in_order_and_leaves_nothing(streams):
    """However it is cut into packets, wherever it ends, and whether its end is a half-closed connection."""

    async def one(made: House, stream: Any) -> None:
        wanted, cuts, end, half = stream
        whole = b"".join(data for data, _, _ in wanted)
        sent = whole if end is None else whole[: int(end * len(whole))]
        pieces, at = [], 0
        for cut in cuts:
            pieces.append(sent[at : at + cut])
            at += cut
        line = await made.line()
        closed = LAST if end is None else b""
        with contextlib.suppress(ConnectionError):
            await line.say(*pieces, sent[at:] + closed)
        if half:
            with contextlib.suppress(OSError):
                line.writer.write_eof()
        if end is not None and not half:
            await asyncio.sleep(0.01)
            line.writer.close()
            return
        found = echoed(await line.rest())
        line.writer.close()
        told = [{"path": path.replace("%20", " "), "size": size} for _, path, size in wanted]
        if end is None:
            told.append({"path": "/last", "size": 0})
        assert found == told[: len(found)]
        # an unread body that is still under way ends the connection; so does our end, for who still waits
        assert half or end is not None or len(found) == len(told) or "/unread" in found[-1]["path"]

    async def run() -> None:
        async with house() as made:
            await asyncio.gather(*(one(made, stream) for stream in streams))
            await made.empty()

    everywhere(run)


@given(junk=st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=4), min_size=1, max_size=12))
@settings(max_examples=20, deadline=None)
def test_any_bytes_end_in_nothing_or_a_refusal(junk):
    async def one(made: House, pieces: list[bytes]) -> None:
        line = await made.line()
        with contextlib.suppress(ConnectionError):
            await line.say(*pieces)
        with contextlib.suppress(OSError):
            line.writer.write_eof()
        assert set(statuses(await line.rest())) <= {200, 400, 431, 501, 505, 405}
        line.writer.close()

    async def run() -> None:
        async with house() as made:
            await asyncio.gather(*(one(made, pieces) for pieces in junk))
            await made.empty()

    everywhere(run)


def heard(server: Any, sent: bytes, end: bytes) -> bytes:
    """What a server says to raw bytes, until it has said ``end``."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=120) as line:
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
    head, body = call.split(b"\r\n\r\n")
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=120) as line:
        line.sendall(head + b"\r\n\r\n")
        assert line.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(body)
        assert line.recv(1000).startswith(b"HTTP/1.1 200 OK")
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
        with socket.create_connection((url.host, url.port), timeout=120) as first:
            first.sendall(predict("mood", "first"))
            assert held.busy.wait(20)
            with socket.create_connection((url.host, url.port), timeout=120) as second:
                second.sendall(predict("mood", "second"))
                wait(lambda: started.server.service.queue.items == 1)
            wait(lambda: started.server.service.queue.items == 0)
            held.go.set()
            assert b"200 OK" in first.recv(65_536)
    assert held.texts == ["first"]


def test_calls_are_refused_unread_while_the_queue_is_full(pipeline: Pipeline):
    held: Any = Held(pipeline)
    with running(held, max_queue_tokens=8, max_item_tokens=8) as started:
        url = httpx.URL(started.url)
        with socket.create_connection((url.host, url.port), timeout=120) as first:
            first.sendall(predict("mood", "the"))
            assert held.busy.wait(20)
            with socket.create_connection((url.host, url.port), timeout=120) as second:
                second.sendall(predict("mood", ["the", "the dog was"]))
                wait(lambda: started.server.service.queue.items == 2)
                assert started.post("/predict", {"delta": "mood", "text": "the"}).status_code == 503
                refused = started.post("/predict", b"this was never read")
                held.go.set()
                assert b"200 OK" in second.recv(65_536)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert started.post("/predict", b"and this was").status_code == 400
