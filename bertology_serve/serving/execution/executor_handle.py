"""The server's side of the executors: a fork server makes them, a supervisor replaces one that has ended."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from bertology_serve.errors import Overloaded
from bertology_serve.files import JsonObject
from bertology_serve.serving.execution.channel import Body, Channel, Lost, Op, SharedMemory, problem_of
from bertology_serve.serving.observability.background import Background

log = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "bertology_serve.serving.execution.fork_server")
LOADERS = 2
OUTLINE_SECONDS = 900.0  # for the fork server to load the encoder, from the hub perhaps
FORK_SECONDS = 30.0  # for it to fork, which takes milliseconds
LOAD_SECONDS = 900.0  # for an executor to read a delta, or to settle what runs batches
END_SECONDS = 10.0  # for a process that was killed to end
# One thread until the fork: these would start theirs when they are imported or first used
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # CUDA itself, once asked anything, does not survive a fork
}


class ExecutorHandle:
    """What connects the server with one executor: ``batches``, ``life``, and channels for what may take long."""

    def __init__(self, pid: int, ends: list[socket.socket], inputs: SharedMemory, outputs: SharedMemory) -> None:
        self.pid, self.inputs, self.outputs = pid, inputs, outputs
        self.batches, self._life, self._ended = Channel(ends[0]), ends[1], False
        self._loaders = [Channel(end, LOAD_SECONDS) for end in ends[2:]]
        self._free: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        for channel in self._loaders:
            self._free.put(channel)

    def load(self, op: Op, body: Body) -> JsonObject:
        """Asks on a channel that no batch goes over. Raises Lost, or what the executor answers with."""
        channel = self._free.get()
        try:
            return channel.ask(op, body)
        finally:
            self._free.put(channel)

    def outlive(self) -> None:
        with contextlib.suppress(OSError):
            self._life.recv(1)
        self._ended = True

    def kill(self) -> None:
        """Ends the executor at once, unless it has ended: its number may soon be another's."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Gives everything back; for when nobody uses it any more."""
        for channel in (self.batches, *self._loaders):
            channel.close()
        self._life.close()


class ForkServer:
    """The process that forks executors. It loads the encoder on its own; ``outline`` waits for that."""

    def __init__(self, plan: WorkerOptions) -> None:
        self._plan, self._turn = plan, threading.Lock()
        self._start()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def outline(self) -> JsonObject:
        """What the encoder is that was loaded. Raises what is wrong with it, Lost where the process has ended or
        takes ``OUTLINE_SECONDS``.
        """
        op, body = self._channel.receive(OUTLINE_SECONDS)
        if op is Op.FAULT:
            raise problem_of(body)
        return body

    def fork(self, place: WorkerPlace) -> ExecutorHandle:
        """A new executor. A nursery that has ended, or does not answer within ``FORK_SECONDS``, is started again
        first, which takes as long as at the start.
        """
        with self._turn:
            try:
                return self._fork(place)
            except Lost as problem:
                log.warning("the fork server has ended or hangs (%s); starting another", problem)
                self.close()
                self._start()
                self.outline()
                return self._fork(place)

    def close(self) -> None:
        """Ends it; executors go on."""
        self._channel.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def _start(self) -> None:
        own, other = socket.socketpair()
        command = [*COMMAND, str(other.fileno()), msgspec.json.encode(self._plan).decode()]
        with other:
            self._process = subprocess.Popen(
                command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT}
            )
        self._control, self._channel = own, Channel(own)

    def _fork(self, place: WorkerPlace) -> ExecutorHandle:
        inputs, outputs = SharedMemory(), SharedMemory()
        ends, others = zip(*(socket.socketpair() for _ in range(2 + LOADERS)), strict=True)
        try:
            socket.send_fds(
                self._control, [msgspec.json.encode(place)], [*(one.fileno() for one in others), inputs.fd, outputs.fd]
            )
            _, answer = self._channel.receive(FORK_SECONDS)
            return ExecutorHandle(int(answer["pid"]), list(ends), inputs, outputs)
        except (OSError, Lost, KeyError, ValueError, TypeError) as problem:
            for end in ends:
                end.close()
            raise Lost(str(problem)) from None
        finally:
            for other in others:
                other.close()


@dataclass(frozen=True)
class WorkerOptions:
    """What the nursery loads. ``dtype`` is torch's name of it."""

    backbone: str
    dtype: str = "float32"
    log_level: str = "warning"
    log_format: str = "text"


@dataclass(frozen=True)
class WorkerPlace:
    """Where an executor runs: the device's name, how many threads a batch takes, and on which cores (none: all)."""

    device: str
    threads: int
    cores: tuple[int, ...] = ()


CLOSE_SECONDS = 10.0
PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0)  # seconds before the next attempt, the last one for ever


class Supervisor:
    """``restore(line)`` tells a new executor what to hold; it may raise Lost. For any thread.

    ``restarts`` counts the executors that came after the first. ``background`` runs what watches over them.
    ``unreferenced`` are numbers of deltas that the executor need not keep.
    """

    def __init__(
        self,
        nursery: ForkServer,
        place: WorkerPlace,
        restore: Callable[[ExecutorHandle], None],
        background: Background | None = None,
    ) -> None:
        self._nursery, self._place, self._restore = nursery, place, restore
        self._changed = threading.Condition()
        self._line: ExecutorHandle | None = None
        self._closing = threading.Event()
        self.restarts, self.unreferenced = 0, deque[int]()
        self.seconds = 0.0  # that the last restart took
        self._background = background or Background()
        self._thread: threading.Thread | None = None

    def start(self, name: str = "supervisor") -> None:
        """Starts the first executor, in this thread; raises Lost where it does not come up."""
        self._line = self._born()
        self._thread = self._background.thread(name, self._watch, vital=True)

    def forgotten(self) -> list[int]:
        """What the executor is told to keep no longer."""
        return [self.unreferenced.popleft() for _ in range(len(self.unreferenced))]

    @property
    def is_up(self) -> bool:
        """Whether there is an executor that knows what it should."""
        return self._line is not None

    @property
    def pid(self) -> int | None:
        line = self._line
        return line.pid if line else None

    def line(self, patience: float | None = None) -> ExecutorHandle:
        """The line to the executor; waits for one, for so many seconds. Overloaded where none comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._line is not None or self._closing.is_set(), patience)
            if self._line is None:
                raise Overloaded("the executor does not come up; try again in 5 s", retry_after=5.0)
            return self._line

    def lost(self, line: ExecutorHandle) -> None:
        """An executor has not answered as it should: it is ended, and another one comes."""
        with self._changed:
            if self._line is line:
                self._line = None
        line.kill()

    def close(self) -> None:
        """Ends the executor; there will be no other."""
        with self._changed:
            self._closing.set()
            line, self._line = self._line, None
            self._changed.notify_all()
        if line is not None:
            line.kill()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)  # it may wait for a fork server that hangs

    def _watch(self) -> None:
        """Until it closes there is an executor, or another one on its way."""
        while not self._closing.is_set():
            line = self._line or self._replaced()
            if line is None:
                return
            line.outlive()
            with self._changed:
                self._line = None
            line.close()
            if not self._closing.is_set():
                log.warning("the executor (process %d) has ended; starting another", line.pid)

    def _born(self) -> ExecutorHandle:
        """A new executor, that knows all. Raises Lost."""
        line = self._nursery.fork(self._place)
        try:
            self._restore(line)
        except BaseException:
            line.kill()
            line.close()
            raise
        return line

    def _replaced(self) -> ExecutorHandle | None:
        """Another executor, that knows all; ``None`` while closing."""
        started, attempt = time.monotonic(), 0
        while not self._closing.is_set():
            self._closing.wait(PAUSES[min(attempt, len(PAUSES) - 1)])
            attempt += 1
            try:
                line = self._born()
            except Exception as problem:  # whatever it is, there must be an executor
                log.error("no executor came up (%s: %s); trying again", type(problem).__name__, problem)
                continue
            with self._changed:
                if self._closing.is_set():
                    line.kill()
                    return line
                self._line = line
                self.seconds = time.monotonic() - started
                self.restarts += 1
                self._changed.notify_all()
            log.info("the executor is back after %.2f s (process %d)", self.seconds, line.pid)
            return line
        return None
