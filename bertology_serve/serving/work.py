"""The nouns of the queue: a call's ticket, and the pieces of work that it is waiting for."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from enum import Enum

from bertology_serve.encoder.pipeline import Job, Prediction

Outcome = Prediction | Exception


class State(Enum):
    """Where a piece of work is: a batch takes it once, or nobody wants it any more."""

    WAITING = "waiting"
    TAKEN = "taken"
    DROPPED = "dropped"


DEFAULT_PRIORITY = 5  # of calls that ask for none


class Work:
    """One job of one call. ``cost`` is in tokens, ``squares`` the sum of its sequences' squared lengths; ``arrived``,
    ``started`` and ``deadline`` are in seconds of the queue's clock; 0: not yet.

    Of one delta's work that with the lowest ``priority`` goes first; 0 asks for none.
    """

    __slots__ = ("arrived", "cost", "deadline", "index", "job", "priority", "squares", "started", "state", "ticket")

    def __init__(self, job: Job, ticket: Ticket, index: int, deadline: float = math.inf, priority: int = 0) -> None:
        self.job, self.ticket, self.index, self.deadline = job, ticket, index, deadline
        self.priority = priority or DEFAULT_PRIORITY
        self.cost, self.squares = job.cost, squares_of(job)
        self.arrived, self.started, self.state = 0.0, 0.0, State.WAITING

    @property
    def delta(self) -> str:
        """The name of the delta that it waits for."""
        return self.job.request.delta

    @property
    def version(self) -> str:
        """The version of it that the call began with."""
        return self.job.ready.delta.version


def squares_of(job: Job) -> int:
    """The sum of the squares of a job's sequences' lengths: what attention costs."""
    return sum(len(encoding) ** 2 for encoding in job.encodings)


class Ticket:
    """What one call waits for: an outcome for each of its jobs, in order. Belongs to the event loop's thread."""

    def __init__(
        self, jobs: Sequence[Job], loop: asyncio.AbstractEventLoop, deadline: float = math.inf, priority: int = 0
    ) -> None:
        self.works = [Work(job, self, index, deadline, priority) for index, job in enumerate(jobs)]
        self.done: asyncio.Future[list[Outcome]] = loop.create_future()
        self._outcomes: list[Outcome | None] = [None] * len(jobs)
        self._left = len(jobs)

    def settle(self, index: int, outcome: Outcome) -> None:
        """Notes one outcome; the last one wakes the call. An outcome that comes twice is kept once."""
        if self._outcomes[index] is not None:
            return
        self._outcomes[index] = outcome
        self._left -= 1
        if not self._left and not self.done.done():
            self.done.set_result([outcome for outcome in self._outcomes if outcome is not None])

    def fail(self, problem: Exception) -> None:
        """Wakes the call with an error, unless it has been woken before."""
        if not self.done.done():
            self.done.set_exception(problem)
