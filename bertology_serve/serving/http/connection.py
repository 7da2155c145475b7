"""One HTTP/1.1 connection, as a state machine: a client can make the server wait, keep or work within bounds only.

httptools parses, uvicorn starts and stops the server, an ASGI application answers; what lies between them is here.

| state | what is awaited | clock |
|---|---|---|
| IDLE | the next call | ``keep_alive`` seconds (the first call: ``max_seconds``) |
| HEAD | the rest of a head, of at most ``max_head`` bytes and ``FIELDS`` fields | ``max_seconds`` |
| BODY | the rest of a body; trailers and chunk extensions are counted, and forgotten | ``max_seconds`` and a grace |
| CALL | the application | its own |
| WRITE | that the client reads the answer | ``max_seconds`` for each part of it |
| DRAIN | the rest of a body whose call was answered without it, of at most ``DRAINED`` bytes | ``max_seconds`` |
| CLOSING | that the client, which may go on for four bodies, reads the last answer and hangs up | ``max_seconds`` |

A call that came before its turn waits unparsed, in the system's buffers but for one piece of data.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools

from bertology_serve.files import JsonObject
from bertology_serve.serving.http.request_id import REQUEST_ID_FIELD, id_in
from bertology_serve.serving.observability.logs import place_of

log = logging.getLogger(__name__)
CONNECTION, WHOLE = "bertology.connection", "bertology.whole"  # in the scope: whose call it is; that its body is there
PIECE = 4096  # bytes that are parsed at once; calls in them after the first are kept as they were parsed
FIELDS = 128  # most fields in a head
BUFFERED = 65_536  # bytes of a body beyond which reading waits for the application
DRAINED = 65_536  # bytes of a body that is not wanted, for the sake of the connection
WRITTEN = 262_144  # bytes of an answer that are written at once
GRACE = 5.0  # seconds beyond max_seconds, in which the application may say that the body came too slowly
BARE = frozenset({204, 304})  # answers without a body
STATUS = {one.value: b"HTTP/1.1 %d %s\r\n" % (one.value, one.phrase.encode()) for one in HTTPStatus}
Headers = list[tuple[bytes, bytes]]


class ConnectionState(Enum):
    """What is awaited; see above."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    CALL = "call"
    WRITE = "write"
    DRAIN = "drain"
    CLOSING = "closing"


class Refused(Exception):
    """A head that is not taken: ``status`` and the message of the answer. The connection closes after it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    def answer(self, headers: Headers) -> bytes:
        """The whole answer; ``headers`` are those that every answer has."""
        body = b'{"error":"%s"}' % self.message.encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        return STATUS[self.status] + b"".join(b"%s: %s\r\n" % one for one in headers) + head + body


class Crowd:
    """The connections that are open, at most so many. A newcomer to a full house takes the place of another.

    That is the one which has been waited for longest: of those that never showed a valid key, if there are any. Calls
    that are being answered are left alone; where there is nothing else, the newcomer is cut off.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._all: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._all)

    def enter(self, newcomer: Connection) -> None:
        """Makes room for a connection, and keeps it."""
        if len(self._all) >= self.most:
            unused = [one for one in self._all if one.can_go]
            last = min(unused, key=lambda one: (one.known, one.since), default=newcomer)
            last.cut()
            self._all.discard(last)
            if last is newcomer:
                return
        self._all.add(newcomer)

    def leave(self, connection: Connection) -> None:
        """Forgets a connection that was lost."""
        self._all.discard(connection)


class HttpCall:
    """A parsed head, the body as it comes, and the answer as it goes. The two ends of ASGI."""

    __slots__ = ("answered", "body", "chunked", "close", "connection", "expects", "head", "headers", "left", "method",
                 "news", "scope", "sized", "started", "taken", "url", "version", "whole")  # fmt: skip

    def __init__(self, connection: Connection, url: bytes, headers: Headers, method: bytes, version: str) -> None:
        self.connection, self.url, self.headers = connection, url, headers
        self.method, self.version = method.decode("ascii"), version
        self.body, self.news = bytearray(), asyncio.Event()
        self.whole = self.taken = False  # the body is there; the application has all of it
        self.started = self.answered = self.expects = self.chunked = self.sized = False
        self.close = version == "1.0"
        self.left = 0  # bytes of the body that were announced and have not come
        self.head = b""
        self.scope: JsonObject = {}
        self._read_headers()

    def _read_headers(self) -> None:
        hosts = 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                self.left = int(value)
            elif name == b"transfer-encoding":
                self.chunked = True
                if value.strip().lower() != b"chunked" or self.version == "1.0":
                    raise Refused(501, "this Transfer-Encoding is not supported; send chunked, or a Content-Length")
            elif name == b"expect":
                self.expects = value.strip().lower() == b"100-continue"
        if hosts > 1 or (not hosts and self.version == "1.1"):
            raise Refused(400, f"there are {hosts} Host headers; expected one")

    def open(self) -> JsonObject:
        """The scope; Refused for a target that is no path."""
        try:
            target = httptools.parse_url(self.url)
            path = target.path.decode("ascii")
        except (httptools.HttpParserError, UnicodeDecodeError, AttributeError):
            raise Refused(400, "the target of the call is not understood; expected a path") from None
        connection = self.connection
        self.scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": self.version,
            "server": connection.server, "client": connection.client, "scheme": "http", "method": self.method,
            "root_path": "", "path": unquote(path) if "%" in path else path, "raw_path": target.path,
            "query_string": target.query or b"", "headers": self.headers, CONNECTION: connection,
        }  # fmt: skip
        if self.whole:
            self.scope[WHOLE] = True
        return self.scope

    async def receive(self) -> JsonObject:
        """What has come of the body; waits for some."""
        if self.expects and not self.whole and not self.started:
            self.expects = False
            self.connection.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.body or (self.whole and not self.taken) or self.answered or self.connection.lost):
            self.news.clear()
            await self.news.wait()
        if self.answered or self.connection.lost:
            return {"type": "http.disconnect"}
        body, self.body, self.taken = bytes(self.body), bytearray(), self.whole
        if not self.whole:
            self.connection.go_on()
        return {"type": "http.request", "body": body, "more_body": not self.taken}

    async def send(self, message: Any) -> None:
        """Head and body of the answer: they go together, in one packet where that is large enough."""
        if self.connection.lost or self.answered:
            return
        if message["type"] == "http.response.start":
            self.head = self._head(message["status"], message.get("headers", ()))
            self.started = True
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.method == "HEAD":
            body = b""
        elif not self.sized:
            body = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        await self._write(body, more)
        if not more and not self.answered:
            self.answered = True
            self.connection.has_answered(self)

    def _head(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        if not self.whole and (self.chunked or self.expects or self.left > DRAINED):
            self.close = True  # the body is not wanted, and too long to be waited for
        parts, told = [STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status], False
        self.sized = status in BARE
        for name, value in (*self.connection.state.default_headers, *headers):
            if b"\n" in value or b"\r" in value:
                raise ValueError("a header's value holds a line break")
            if name == b"content-length":
                self.sized = True
            elif name == b"connection" and value.lower() == b"close":
                self.close = told = True
            parts += (name, b": ", value, b"\r\n")
        if self.close and not told:
            parts.append(b"connection: close\r\n")
        if not self.sized and self.version == "1.0":
            self.sized = True  # it ends with the connection
        elif not self.sized and self.method != "HEAD":
            parts.append(b"transfer-encoding: chunked\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    async def _write(self, body: bytes, more: bool) -> None:
        data, self.head = self.head + body[:WRITTEN] if self.head else body[:WRITTEN], b""
        self.connection.say(data)
        for at in range(WRITTEN, len(body), WRITTEN):
            await self.connection.drained()
            self.connection.say(body[at : at + WRITTEN])
        await self.connection.drained()


class Connection(asyncio.Protocol):
    """See above. ``limited`` makes the class with its bounds; uvicorn makes one of it for each connection."""

    max_head = 16_384
    max_body = 2**22
    max_seconds = 20.0
    keep_alive = 75.0
    crowd = Crowd(1024)

    def __init__(self, config: Any, server_state: Any, app_state: Any = None, _loop: Any = None) -> None:
        self.loop: asyncio.AbstractEventLoop = _loop or asyncio.get_running_loop()
        self._app, self.state = config.loaded_app, server_state
        self.transport: Any = None
        self.server: tuple[str, int] | None = None
        self.client: tuple[str, int] | None = None
        self.known = self.lost = False  # known: a call of it showed a valid key, or needed none
        self.since, self._due, self._armed = 0.0, math.inf, math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.now = ConnectionState.IDLE
        self._parser: Any = None
        self._url, self._headers = b"", Headers()
        self._in_head = self._began = self._muted = False
        self._bytes = 0  # of the head or the body that is being read, as they came
        self._unread = b""
        self._incoming: HttpCall | None = None  # whose body is being read
        self._call: HttpCall | None = None  # who is being answered
        self._waiting = deque[HttpCall | Refused]()
        self._stopping = self._paused = False
        self._writable: asyncio.Future[None] | None = None
        self._left: Callable[[], None] | None = None

    # what the system tells

    def connection_made(self, transport: Any) -> None:
        """The first head is due."""
        self.transport = transport
        self.server, self.client = _address(transport, "sockname"), _address(transport, "peername")
        self._parser = httptools.HttpRequestParser(self)
        self.state.connections.add(self)
        self._enter(ConnectionState.IDLE, self.max_seconds)
        self.crowd.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due, and nobody waits."""
        self.lost = True
        self.crowd.leave(self)
        self.state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._left is not None:
            self._left()
            self._left = None
        if self._call is not None:
            self._call.news.set()
        self._waiting.clear()
        self._unread, self._parser = b"", None

    def data_received(self, data: bytes) -> None:
        """Parses, up to the end of one call; what comes after it waits."""
        if self.now is ConnectionState.CLOSING:
            self._bytes += len(data)
            if self._bytes > DRAINED + 4 * self.max_body:
                self.cut()
        elif self._parser is None:
            self._pause()
        elif self._unread or self.now is ConnectionState.CALL or self.now is ConnectionState.WRITE:
            self._unread += data
            self._pause()
        else:
            self._feed(data)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        self._writable = self.loop.create_future()
        if self.now is not ConnectionState.CLOSING:
            self._enter(ConnectionState.WRITE, self.max_seconds)

    def resume_writing(self) -> None:
        """It has read some."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None
        if self.now is ConnectionState.WRITE:
            self._enter_call()
            self.go_on()

    # what the parser tells

    def on_message_begin(self) -> None:
        """A head begins."""
        if not self._muted:
            self._url, self._headers, self._in_head, self._began, self._bytes = b"", [], True, True, 0

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        if not self._muted:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head. Those of trailers are forgotten."""
        if self._in_head:
            if len(self._headers) >= FIELDS:
                raise Refused(431, f"the head holds more than {FIELDS} fields; send less")
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is there: its call begins, or waits for its turn."""
        if self._muted:
            return
        self._in_head, self._bytes = False, 0
        version, method = self._parser.get_http_version(), self._parser.get_method()
        if version not in ("1.0", "1.1"):
            raise Refused(505, "this version of HTTP is not supported; expected 1.1")
        if method == b"CONNECT":
            raise Refused(405, "CONNECT is not for this server")
        call = HttpCall(self, self._url, self._headers, method, version)
        call.close = call.close or not self._parser.should_keep_alive()
        self._incoming = call
        if self._call is None:
            self._begin(call)
        else:
            self._waiting.append(call)

    def on_body(self, data: bytes) -> None:
        """A part of a body. It is kept for the application, as long as that has not answered."""
        call = self._incoming
        if call is None:
            return
        call.left -= len(data)
        if not call.answered:
            call.body += data
            call.news.set()
            if len(call.body) > BUFFERED:
                self._pause()

    def on_message_complete(self) -> None:
        """The body is there."""
        call = self._incoming
        if call is None or self._parser.should_upgrade():  # what looks like the end goes on, see _ignore_upgrade
            return
        self._incoming, self._headers, call.whole = None, [], True
        call.scope[WHOLE] = True
        call.news.set()
        if call is self._call:
            if call.answered:
                self._end()
            else:
                self._enter_call()

    def _feed(self, data: bytes) -> None:
        """Parses piece by piece, as long as there is a call to be read."""
        at, size = 0, len(data)
        while (
            at < size
            and self.now not in (ConnectionState.CALL, ConnectionState.WRITE, ConnectionState.CLOSING)
            and not self.lost
        ):
            piece = data[at : at + PIECE] if at or size > PIECE else data
            at += len(piece)
            self._began = False
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade as stop:
                at -= len(piece) - stop.args[0]
                self._ignore_upgrade()
            except httptools.HttpParserError as problem:
                self._refuse(problem)
                return
            if not self._began:
                self._bytes += len(piece)
            self._judge()
        if at < size and self.now is not ConnectionState.CLOSING:
            self._unread = data[at:]
            self._pause()

    def _judge(self) -> None:
        """Whether what has come so far is too much, and what is awaited now."""
        if self._in_head and self._bytes > self.max_head:
            self._refuse(Refused(431, f"the path and headers hold more than {self.max_head} bytes; send less"))
        elif self._in_head and self.now is ConnectionState.IDLE:
            self._enter(ConnectionState.HEAD, self.max_seconds)
        elif (self.now is ConnectionState.BODY and self._bytes > 2 * self.max_body + self.max_head) or (
            self.now is ConnectionState.DRAIN and self._bytes > 2 * DRAINED
        ):
            self.cut()

    def _ignore_upgrade(self) -> None:
        """Goes on with the body of a call that offers another protocol; that is not taken up.

        The parser thinks that the rest is no HTTP, so that a new one is told how long the body is.
        """
        call = self._incoming
        assert call is not None
        framing = b"Transfer-Encoding: chunked" if call.chunked else b"Content-Length: %d" % call.left
        self._parser, self._muted = httptools.HttpRequestParser(self), True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
        finally:
            self._muted = False

    def _refuse(self, problem: Exception) -> None:
        """Answers what is no call that can be taken, after those before it. Nothing is parsed any more."""
        reason = problem if isinstance(problem, Refused) else problem.__context__
        self._parser, self._in_head = None, False
        call, broken, self._incoming = self._call, self._incoming, None
        if self._waiting and self._waiting[-1] is broken:
            self._waiting.pop()
        self._waiting.append(
            reason if isinstance(reason, Refused) else Refused(400, "this is not HTTP/1.1; the connection ends here")
        )
        if call is None or (call is broken and not call.started):
            if call is not None:  # whose body will never be there
                call.answered = True
                call.news.set()
            self._end()
        elif call is broken:
            call.close = True
            if call.answered:
                self._close()

    # calls, one after the other

    def _begin(self, call: HttpCall) -> None:
        call.open()
        self._call = call
        self._enter_call()
        if not call.whole:
            self.go_on()
        task = self.loop.create_task(self._run(call))
        self.state.tasks.add(task)
        task.add_done_callback(self.state.tasks.discard)

    async def _run(self, call: HttpCall) -> None:
        try:
            await self._app(call.scope, call.receive, call.send)
        except Exception as problem:
            log.error("%s %s raised %s", call.method, call.scope["path"], place_of(problem))
        if not call.answered and not self.lost:  # the application has failed
            if not call.started:
                self._tell(Refused(500, "the server failed on this call; the fault is in its log"), call.headers)
            self._close()

    def has_answered(self, call: HttpCall) -> None:
        """The answer has been written."""
        self._left = None
        self.state.total_requests += 1
        if self.lost:
            return
        if call.close:
            self._close()
        elif call.whole:
            self._end()
        else:
            self._bytes = 0
            self._enter(ConnectionState.DRAIN, self.max_seconds)
            self.go_on()

    def _end(self) -> None:
        self._call = None
        self._next()

    def _next(self) -> None:
        """The next call that has come, the rest of it, or the wait for it."""
        if self._waiting:
            call = self._waiting.popleft()
            asked = self._headers if isinstance(call, Refused) else call.headers
            try:
                if isinstance(call, Refused):
                    raise call
                self._begin(call)
            except Refused as refused:
                self._tell(refused, asked)
                self._close()
            return
        self._enter(ConnectionState.HEAD, self.max_seconds) if self._in_head else self._enter(
            ConnectionState.IDLE, self.keep_alive
        )
        self.go_on()
        if self._stopping and self.now is ConnectionState.IDLE:
            self._close()

    def go_on(self) -> None:
        """Reads on: what has come already, then what comes."""
        if self._unread:
            data, self._unread = self._unread, b""
            self._feed(data)
        if self._paused and not self._unread and self.now is not ConnectionState.CLOSING:
            self._resume()

    def _resume(self) -> None:
        if self._paused and not self.lost and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def _pause(self) -> None:
        if not self._paused and not self.lost and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    # what goes out, and the end

    def say(self, data: bytes) -> None:
        """Writes, unless nobody is there."""
        if data and not self.lost and not self.transport.is_closing():
            self.transport.write(data)

    def _tell(self, refused: Refused, asked: Headers) -> None:
        """Answers a call with those headers, as far as they have come."""
        self.say(refused.answer([*self.state.default_headers, (REQUEST_ID_FIELD, id_in(asked))]))

    async def drained(self) -> None:
        """Waits until most of what was written has gone."""
        if self._writable is not None:
            await self._writable

    def watch(self, left: Callable[[], None]) -> None:
        """Calls ``left`` when the client hangs up before it is answered. One call at a time is, so one is kept."""
        if self.lost or self.transport.is_closing():
            self.loop.call_soon(left)
        else:
            self._left = left

    def shutdown(self) -> None:
        """The server stops: calls that have come are answered, and nothing else is waited for."""
        self._stopping = True
        if self.now in (ConnectionState.IDLE, ConnectionState.HEAD, ConnectionState.DRAIN, ConnectionState.CLOSING):
            self._close()

    def cut(self) -> None:
        """Ends the connection now."""
        self._enter(ConnectionState.CLOSING, self.max_seconds)
        self.transport.abort()

    def _close(self) -> None:
        """Ends it once the client has read what was written.

        While it may still be sending, only our side is closed: the system would throw the answer away otherwise.
        """
        unread = bool(self._unread) or self._incoming is not None or self._parser is None
        self._bytes, self._unread = 0, b""
        self._enter(ConnectionState.CLOSING, self.max_seconds)
        if unread and not self._stopping and not self.lost and not self.transport.is_closing():
            self.transport.write_eof()
            self._resume()
        else:
            self.transport.close()

    # the clock

    @property
    def can_go(self) -> bool:
        """Whether nothing is lost with it: no call of it is being answered."""
        return self.now is not ConnectionState.CALL and not (self.now is ConnectionState.BODY and self.known)

    def _enter_call(self) -> None:
        call = self._call
        if call is None or call.whole:
            self._enter(ConnectionState.CALL, math.inf)
        else:
            self._enter(ConnectionState.BODY, self.max_seconds + GRACE)

    def _enter(self, state: ConnectionState, seconds: float) -> None:
        self.now, self.since = state, self.loop.time()
        self._due = self.since + seconds
        if self._due < self._armed and not self.lost:
            if self._timer is not None:
                self._timer.cancel()
            self._armed, self._timer = self._due, self.loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        """A timer is set for the earliest clock that has run; where the state has changed it is set again."""
        self._timer, self._armed = None, math.inf
        if self._due <= self.loop.time() + 1e-3:
            self.cut()
        elif self._due < math.inf:
            self._armed, self._timer = self._due, self.loop.call_at(self._due, self._tick)


def _address(transport: Any, name: str) -> tuple[str, int] | None:
    found = transport.get_extra_info(name)
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None


def limited(
    max_head: int, max_body: int, max_seconds: float, keep_alive: float = 75.0, most: int = 1024
) -> type[Connection]:
    """The protocol with those bounds, of at most so many connections at once."""
    bounds = {"max_head": max_head, "max_body": max_body, "max_seconds": max_seconds, "keep_alive": keep_alive}
    return type("Connection", (Connection,), {**bounds, "crowd": Crowd(most)})
