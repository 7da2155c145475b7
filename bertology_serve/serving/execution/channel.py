"""What the server and its executor's process say to each other: a head of five bytes, then JSON. No pickle.

Numbers of a batch travel through memory that both share, without a name."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import threading
import weakref
from collections.abc import Sequence
from enum import IntEnum

import msgspec
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from bertology_serve import errors
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import BertologyError, Overloaded
from bertology_serve.files import JsonMapping, JsonObject
from bertology_serve.tasks.spec import POOLED_KINDS, Encoding

HEAD = struct.Struct("<BI")  # what it is, bytes of JSON
LARGEST = 64 * 2**20
Body = JsonMapping


class Op(IntEnum):
    """What a frame asks for; ``DONE`` and ``FAULT`` are answers."""

    DONE = 0
    FAULT = 1
    READ = 2  # a delta's directory
    ADMIT = 3  # its rows into the bank
    FREE = 4
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

    def ask(self, op: Op, body: Body) -> JsonObject:
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

    def receive(self, patience: float | None = None) -> tuple[Op, JsonObject]:
        """The next frame; Lost where none comes any more, or not within so many seconds."""
        self._socket.settimeout(patience)
        kind, size = HEAD.unpack(self._exactly(HEAD.size))
        if size > LARGEST:
            raise Lost(f"a frame of {size} bytes; at most {LARGEST} are taken")
        try:
            return Op(kind), msgspec.json.decode(self._exactly(size), type=JsonObject)
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


def fault(problem: BertologyError) -> JsonObject:
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


PAGE = 1 << 20  # what it grows by, in bytes


class SharedMemory:
    """One writer, one reader, who are told of each other's doings by frames. Grows as it needs to.

    ``fd`` is its file descriptor, which the other process gets.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("bertology-serve") if fd is None else fd
        self._map: mmap.mmap | None = None
        weakref.finalize(self, os.close, self.fd)  # not before: another thread's number may soon be another file's

    def write(self, arrays: Sequence[NDArray[np.generic]]) -> None:
        """Lays arrays one after the other from the beginning."""
        size = sum(array.nbytes for array in arrays)
        if not size:
            return
        if size > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, -(-size // PAGE) * PAGE)
        memory, at = self._mapped(size), 0
        for array in arrays:
            memory[at : at + array.nbytes] = array.tobytes()
            at += array.nbytes

    def read(self, count: int, dtype: DTypeLike) -> NDArray[np.generic]:
        """A copy of that many numbers from the beginning; Lost where they cannot be there."""
        size = count * np.dtype(dtype).itemsize
        if not 0 <= size <= os.fstat(self.fd).st_size:
            raise Lost(f"{size} bytes are said to be in {os.fstat(self.fd).st_size}")
        if not size:
            return np.zeros(0, dtype)
        return np.frombuffer(self._mapped(size)[:size], dtype=dtype)

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return self._map


Owned = tuple[int, Encoding]  # the number of a sequence's delta in the batch's list of keys, and its tokens


def put_batch(arena: SharedMemory, owned: Sequence[Owned]) -> tuple[int, int]:
    """Writes S owners, S lengths, T ids and T types, int32; returns (S, T)."""
    lengths = [len(encoding) for _, encoding in owned]
    columns = (
        [owner for owner, _ in owned],
        lengths,
        [number for _, encoding in owned for number in encoding.ids],
        [number for _, encoding in owned for number in encoding.types],
    )
    arena.write([np.array(column, dtype=np.int32) for column in columns])
    return len(owned), sum(lengths)


def take_batch(arena: SharedMemory, sequences: int, tokens: int) -> list[Owned]:
    """What ``put_batch`` wrote; Lost where it is no such batch."""
    numbers = arena.read(2 * (sequences + tokens), np.int32).tolist()
    owners, lengths = numbers[:sequences], numbers[sequences : 2 * sequences]
    if min(lengths, default=0) < 0 or sum(lengths) != tokens:
        raise Lost(f"sequences of {sum(lengths)} tokens; expected {tokens}")
    ids, types = numbers[2 * sequences : 2 * sequences + tokens], numbers[2 * sequences + tokens :]
    found, at = [], 0
    for owner, length in zip(owners, lengths, strict=True):
        found.append((owner, Encoding(tuple(ids[at : at + length]), tuple(types[at : at + length]))))
        at += length
    return found


def put_outputs(arena: SharedMemory, outputs: Sequence[Tensor]) -> int:
    """Writes the numbers of all outputs, float32; returns how many."""
    flat = torch.cat([output.reshape(-1) for output in outputs])
    arena.write([flat.to(torch.float32).numpy()])
    return flat.numel()


def take_outputs(arena: SharedMemory, count: int, owned: Sequence[tuple[Delta, Encoding]], hidden: int) -> list[Tensor]:
    """Each sequence's output, [C], [len, C] or [H] as its delta's task has it; Lost where the numbers are others."""
    shapes = [shape_of(delta, encoding, hidden) for delta, encoding in owned]
    sizes = [int(np.prod(shape)) for shape in shapes]
    if count != sum(sizes):
        raise Lost(f"{count} numbers came back; expected {sum(sizes)}")
    numbers: NDArray[np.generic] = arena.read(count, np.float32)
    parts = torch.split(torch.from_numpy(numbers.copy()), sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def shape_of(delta: Delta, encoding: Encoding, hidden: int) -> tuple[int, ...]:
    """The shape of a sequence's output."""
    task = delta.task
    if task.kind in POOLED_KINDS:
        return (hidden,)
    return (len(encoding), task.outputs) if task.per_token else (task.outputs,)
