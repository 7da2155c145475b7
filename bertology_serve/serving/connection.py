"""One connection: uvicorn's protocol with a bound on heads, which it lacks, and with less work for each call."""

from __future__ import annotations

import asyncio
from asyncio import Protocol
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s"
)


CONNECTION, WHOLE = "bertology.connection", "bertology.whole"  # in the scope: whose call it is; that its body is there
HEAD = b"HTTP/1.1 "


class Together:
    """A transport that sends an answer's head with the body after it: one system call, and one packet to be woken by.

    uvicorn writes head and body one after the other. A head that no body follows goes when the call ends.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._head = transport, b""
        self.is_closing, self.abort = transport.is_closing, transport.abort

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Keeps a head, sends everything else."""
        if not self._head and data.startswith(HEAD) and not data.startswith(b"100", len(HEAD)):
            self._head = data
            return
        head, self._head = self._head, b""
        self._transport.writelines((head, data) if head else (data,))

    def flush(self) -> None:
        """Sends what was kept."""
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self._transport.write(head)

    def close(self) -> None:
        """Sends what was kept, then hangs up."""
        self.flush()
        self._transport.close()


class Connection(HttpToolsProtocol):
    """Closes where a head goes on beyond ``max_head`` bytes, or for longer than ``max_seconds``.

    Heads that came whole in one piece of data are the gate's to judge.
    """

    max_head = 0
    max_seconds = 0.0
    _timer: asyncio.TimerHandle | None = None
    _in_head = False
    _pending = 0
    _departure: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(Together(transport))  # type: ignore[arg-type]
        self._due()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due, and nobody waits."""
        self._came()
        if self._departure is not None and not self._departure.done():
            self._departure.set_result(None)
        super().connection_lost(exc)

    def departure(self) -> asyncio.Future[None]:
        """Done when the client has hung up. One call at a time is answered, so one future is kept."""
        self._departure = self.loop.create_future()
        if self.transport.is_closing():
            self._departure.set_result(None)
        return self._departure

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._in_head, self._pending = True, 0
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        self._came()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there: who reads it need not wait."""
        super().on_message_complete()
        self.scope[WHOLE] = True  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        """The answer has been written; an empty one's head too."""
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()

    def _due(self) -> None:
        self._timer = self.loop.call_later(self.max_seconds, self.transport.abort)

    def _came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to a head that has not ended, which is due from now on."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._timer is None:
            self._due()
        self._pending += len(data)
        if self._pending > self.max_head:
            body = b'{"error":"the path and headers hold more than %d bytes; send less"}' % self.max_head
            self.transport.write(REFUSAL % (len(body), body))
            self.transport.close()


def limited(most: int, seconds: float) -> type[Protocol]:
    """The protocol with those bounds, in bytes and in seconds from a head's beginning to its end."""
    return type("Connection", (Connection,), {"max_head": most, "max_seconds": seconds})
