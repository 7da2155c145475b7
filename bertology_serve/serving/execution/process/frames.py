"""What the server and its executor's process say to each other: a head of five bytes, then JSON. No pickle.

Numbers of a batch do not travel here but through shared memory (``arena``).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import weakref
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import msgspec

from bertology_serve import errors
from bertology_serve.errors import BertologyError, Overloaded

HEAD = struct.Struct("<BI")  # what it is, bytes of JSON
LARGEST = 64 * 2**20
Body = Mapping[str, Any]


class Op(IntEnum):
    """What a frame asks for; ``DONE`` and ``FAULT`` are answers."""

    DONE = 0
    FAULT = 1
    READ = 2  # a delta's directory
    ADMIT = 3  # its rows into the bank
    RELEASE = 4
    RUN = 5  # a batch
    SETTLE = 6  # which engine runs batches
    HELLO = 7  # nothing but an answer


class Lost(Exception):
    """The other end has gone, does not answer in time, or says what makes no sense."""


class Channel:
    """One end of a connected stream socket. ``ask`` may be called by any thread, one exchange at a time.

    ``patience`` is the seconds after which an answer will not come; ``None``: it may take for ever.
    """

    def __init__(self, end: socket.socket, patience: float | None = None) -> None:
        self._socket, self._turn = end, threading.Lock()
        weakref.finalize(self, end.close)
        self.patience = patience

    def ask(self, op: Op, body: Body) -> dict[str, Any]:
        """The other end's answer. Raises Lost, or the error that it answers with."""
        with self._turn:
            self.send(op, body)
            said, answer = self.receive(self.patience)
        if said is Op.FAULT:
            raise problem_of(answer)
        if said is not Op.DONE:
            raise Lost(f"got {said.name}; expected an answer")
        return answer

    def send(self, op: Op, body: Body) -> None:
        """Sends one frame. Lost where nobody reads."""
        payload = msgspec.json.encode(body)
        try:
            self._socket.settimeout(self.patience)
            self._socket.sendall(HEAD.pack(op, len(payload)) + payload)
        except OSError as problem:
            raise Lost(f"cannot send: {problem}") from None

    def receive(self, patience: float | None = None) -> tuple[Op, dict[str, Any]]:
        """The next frame; Lost where none comes any more, or not within so many seconds."""
        self._socket.settimeout(patience)
        kind, size = HEAD.unpack(self._exactly(HEAD.size))
        if size > LARGEST:
            raise Lost(f"a frame of {size} bytes; at most {LARGEST} are taken")
        try:
            return Op(kind), msgspec.json.decode(self._exactly(size), type=dict[str, Any])
        except (ValueError, msgspec.DecodeError, RecursionError) as problem:
            raise Lost(f"no frame: {problem}") from None

    def close(self) -> None:
        """Ends it for both sides, also under a thread that waits.

        The descriptor is given back when nobody holds the channel any more: one who is about to wait on it would wait
        on whatever has its number then.
        """
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            try:
                part = self._socket.recv(min(size, 2**20))
            except OSError as problem:
                raise Lost(f"no answer: {problem}") from None
            if not part:
                raise Lost("the other end has gone")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def fault(problem: BertologyError) -> dict[str, Any]:
    """An error as an answer."""
    return {
        "kind": type(problem).__name__,
        "message": str(problem),
        "retry_after": problem.retry_after if isinstance(problem, Overloaded) else None,
    }


def problem_of(body: Body) -> Exception:
    """The error that an answer tells of; RuntimeError for what nobody raised on purpose."""
    kind, message, wait = (
        getattr(errors, str(body.get("kind")), None),
        str(body.get("message")),
        body.get("retry_after"),
    )
    if not isinstance(kind, type) or not issubclass(kind, BertologyError):
        return RuntimeError(message)
    return kind(message, wait) if issubclass(kind, Overloaded) and isinstance(wait, (int, float)) else kind(message)
