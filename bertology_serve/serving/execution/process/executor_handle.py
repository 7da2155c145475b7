"""The server's side of the fork server: it is started once, and forks executors within milliseconds."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from bertology_serve.serving.execution.process.frames import Body, Channel, Lost, Op, problem_of
from bertology_serve.serving.execution.process.shared_memory import SharedMemory

log = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "bertology_serve.serving.execution.process.fork_server")
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

    def load(self, op: Op, body: Body) -> dict[str, Any]:
        """Asks on a channel that no batch goes over. Raises Lost, or what the executor answers with."""
        channel = self._free.get()
        try:
            return channel.ask(op, body)
        finally:
            self._free.put(channel)

    def outlive(self) -> None:
        """Returns when the executor has ended."""
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
        self._plan = plan
        self._start()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def outline(self) -> dict[str, Any]:
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
    """Where an executor runs: the device's name, and how many threads a batch takes."""

    device: str
    threads: int
