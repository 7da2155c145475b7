"""The waiting work of one delta, and its nouns: a call's ticket, its pieces of work, the options of the call."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
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


_order = itertools.count()


class Tally:
    """How much waits."""

    __slots__ = ("items", "tokens")

    def __init__(self) -> None:
        self.items = self.tokens = 0

    def add(self, items: int, tokens: int) -> None:
        """Counts up, or down."""
        self.items += items
        self.tokens += tokens


class DeltaQueue:
    """Lowest priority number first, then earliest deadline, then first come.

    ``waiting`` counts what still waits, ``total`` that of all lanes together.

    ``counter`` is the service that the delta has had: tokens over ``weight``, on the scheduler's scale.
    """

    __slots__ = ("_heap", "counter", "name", "total", "waiting", "weight")

    def __init__(self, name: str, weight: float, counter: float, total: Tally) -> None:
        self.name, self.weight, self.counter = name, weight, counter
        self.waiting, self.total = Tally(), total
        self._heap: list[tuple[int, float, int, Work]] = []

    def push(self, work: Work) -> None:
        """Takes in one piece of work."""
        heapq.heappush(self._heap, (work.priority, work.deadline, next(_order), work))
        self._count(1, work.cost)

    def first(self, now: float) -> Work | None:
        """The next piece, still waiting; ``None`` where there is none. What has expired is dropped on the way."""
        while self._heap:
            work = self._heap[0][3]
            if work.state is State.WAITING and work.deadline > now:
                return work
            heapq.heappop(self._heap)
            if work.state is State.WAITING:
                work.state = State.DROPPED
                self._count(-1, -work.cost)
        return None

    def take(self) -> Work:
        """Removes the piece that ``first`` gave and charges the delta for it."""
        work = heapq.heappop(self._heap)[3]
        work.state = State.TAKEN
        self._count(-1, -work.cost)
        self.counter += work.cost / self.weight
        return work

    def drop(self, work: Work) -> None:
        """Forgets a piece that was waiting; it costs the delta nothing."""
        work.state = State.DROPPED
        self._count(-1, -work.cost)
        if len(self._heap) > 2 * self.waiting.items + 16:
            self._heap = [entry for entry in self._heap if entry[3].state is State.WAITING]
            heapq.heapify(self._heap)

    def _count(self, items: int, tokens: int) -> None:
        self.waiting.add(items, tokens)
        self.total.add(items, tokens)


@dataclass(frozen=True)
class CallOptions:
    """``gone()`` returns when the caller has left: what is still queued is then dropped.

    ``charge(tokens)`` hears what the call costs before it is queued, and may raise. The answer is worth nothing after
    ``seconds``. Of one delta's work the lowest ``priority`` goes first (0: the default one).
    """

    gone: Callable[[], Awaitable[None]] | None = None
    charge: Callable[[int], None] | None = None
    seconds: float = math.inf
    priority: int = 0
