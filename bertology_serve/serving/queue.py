"""The bounded queue between the calls and the executor. Its size is in tokens."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from bertology_serve.errors import Overloaded
from bertology_serve.serving.scheduler import Scheduler
from bertology_serve.serving.work import State, Work

FIRST_GUESS = 10_000.0
LONGEST_WAIT = 60.0


class WorkQueue:
    """Work waits here until a batch takes it. Thread-safe; ``clock`` gives seconds.

    ``put`` takes all of a call's work or none of it. ``tokens`` and ``items`` count what is waiting.
    """

    def __init__(self, scheduler: Scheduler, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_tokens = max_tokens
        self.tokens = self.items = 0
        self.rate = FIRST_GUESS  # tokens answered a second, for Retry-After
        self._scheduler, self._clock = scheduler, clock
        self._changed = threading.Condition()
        self._closed = False

    def put(self, works: Sequence[Work]) -> None:
        """Queues a call's work; Overloaded when it does not fit or the server is stopping."""
        cost = sum(work.cost for work in works)
        with self._changed:
            if self._closed:
                raise Overloaded("the server is stopping; send the call to another one", retry_after=1.0)
            if self.tokens + cost > self.max_tokens:
                wait = min(max(self.tokens / self.rate, 1.0), LONGEST_WAIT)
                raise Overloaded(
                    f"the queue is full: {self.tokens} tokens wait, {cost} more do not fit into {self.max_tokens}; "
                    f"try again in {math.ceil(wait)} s",
                    retry_after=wait,
                )
            now = self._clock()
            for work in works:
                work.arrived = now
                self._scheduler.push(work, now)
            self._count(len(works), cost)
            self._changed.notify()

    def take(self) -> list[Work]:
        """The next batch; waits for one. Empty once the queue is closed and everything in it was taken."""
        with self._changed:
            while True:
                batch = self._scheduler.pick(self._clock())
                if batch:
                    for work in batch:
                        work.state = State.TAKEN
                    self._count(-len(batch), -sum(work.cost for work in batch))
                    return batch
                if self._closed:
                    return []
                self._changed.wait()

    def drop(self, works: Iterable[Work]) -> int:
        """Forgets work that nobody waits for any more and returns how many pieces that spared."""
        with self._changed:
            waiting = [work for work in works if work.state is State.WAITING]
            for work in waiting:
                work.state = State.DROPPED
            self._count(-len(waiting), -sum(work.cost for work in waiting))
            return len(waiting)

    def served(self, tokens: int, seconds: float) -> None:
        """Tells the queue how fast work goes."""
        self.rate += 0.2 * (tokens / max(seconds, 1e-6) - self.rate)

    def close(self) -> None:
        """Takes no more work; what is queued is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _count(self, items: int, tokens: int) -> None:
        self.items += items
        self.tokens += tokens
