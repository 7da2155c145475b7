"""One connection: uvicorn's protocol with a bound on heads, which it lacks."""

from __future__ import annotations

import asyncio
from asyncio import Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s"
)


class Connection(HttpToolsProtocol):
    """Closes where a head goes on beyond ``max_head`` bytes, or for longer than ``max_seconds``.

    Heads that came whole in one piece of data are the gate's to judge.
    """

    max_head = 0
    max_seconds = 0.0
    _timer: asyncio.TimerHandle | None = None
    _in_head = False
    _pending = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self._due()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due."""
        self._came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request line begins."""
        if self._timer is None:
            self._due()
        self._in_head, self._pending = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        self._came()
        super().on_headers_complete()

    def _due(self) -> None:
        self._timer = self.loop.call_later(self.max_seconds, self.transport.abort)

    def _came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to a head that has not ended."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._pending += len(data)
        if self._pending > self.max_head:
            body = b'{"error":"the path and headers hold more than %d bytes; send less"}' % self.max_head
            self.transport.write(REFUSAL % (len(body), body))
            self.transport.close()


def limited(most: int, seconds: float) -> type[Protocol]:
    """The protocol with those bounds, in bytes and in seconds from a head's beginning to its end."""
    return type("Connection", (Connection,), {"max_head": most, "max_seconds": seconds})
