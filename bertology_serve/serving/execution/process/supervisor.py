"""Keeps an executor's process alive: one that has ended is replaced by one that is told what the last one knew."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from bertology_serve.errors import Overloaded
from bertology_serve.serving.execution.process.executor_handle import ExecutorHandle, ForkServer, WorkerPlace
from bertology_serve.serving.observability.background import Background

log = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0)  # seconds before the next attempt, the last one for ever


class Supervisor:
    """``restore(line)`` tells a new executor what to hold; it may raise Lost. For any thread.

    ``restarts`` counts the executors that came after the first. ``background`` runs what watches over them.
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
        self.restarts = 0
        self.seconds = 0.0  # that the last restart took
        self._background = background or Background()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the first executor, in this thread; raises Lost where it does not come up."""
        self._line = self._born()
        self._thread = self._background.thread("supervisor", self._watch, vital=True)

    @property
    def is_up(self) -> bool:
        """Whether there is an executor that knows what it should."""
        return self._line is not None

    @property
    def pid(self) -> int | None:
        """The executor's process."""
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
