"""One connection: uvicorn's protocol with a bound on heads, which it lacks."""

from __future__ import annotations

from asyncio import Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s"
)


class Connection(HttpToolsProtocol):
    """Closes where a head goes on beyond ``max_head`` bytes, before it is read to its end.

    Heads that came whole in one piece of data are the gate's to judge.
    """

    max_head = 0
    _in_head = False
    _pending = 0

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._in_head, self._pending = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        super().on_headers_complete()

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


def limited(most: int) -> type[Protocol]:
    """The protocol with that bound."""
    return type("Connection", (Connection,), {"max_head": most})
