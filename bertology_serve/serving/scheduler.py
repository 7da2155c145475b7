"""Which of the waiting work makes the next batch. Schedulers are pure: no clock, no lock, no thread of their own."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from bertology_serve.serving.work import State, Work


class Scheduler(Protocol):
    """The order of the queue. ``WorkQueue`` calls it under its lock, with its own clock's time in seconds."""

    def push(self, work: Work, now: float) -> None:
        """Takes in one piece of waiting work."""
        ...

    def pick(self, now: float) -> list[Work]:
        """Removes and returns the next batch, work of any deltas together; empty when nothing waits."""
        ...


class OldestFirst:
    """In order of arrival, whatever the delta, up to ``max_tokens``; work beyond the budget goes alone.

    The batch ends at the first piece that does not fit: nothing is overtaken, so nothing starves.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._waiting: deque[Work] = deque()

    def push(self, work: Work, now: float) -> None:
        """Takes in one piece of waiting work."""
        self._waiting.append(work)

    def pick(self, now: float) -> list[Work]:
        """The oldest work that fits the budget; dropped work is forgotten on the way."""
        batch: list[Work] = []
        tokens = 0
        while self._waiting:
            work = self._waiting[0]
            if work.state is State.WAITING:
                if batch and tokens + work.cost > self.max_tokens:
                    break
                batch.append(work)
                tokens += work.cost
            self._waiting.popleft()
        return batch
