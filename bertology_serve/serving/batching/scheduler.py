"""Which of the waiting work makes the next batch: fair between deltas, earliest deadline first within each.

Virtual token counters (VTC; Sheng et al., Fairness in Serving Large Language Models, OSDI 2024), which are exact here:
an encoder's cost is known on arrival. Each delta that waits has a counter of tokens served over its weight; the lowest
goes next, and is charged as it goes. A delta that begins to wait is lifted to the lowest counter of those that wait, so
that idling earns no credit. For any two deltas that wait, the counters differ by at most ``max(cost / weight)`` of one
piece of work; over any time in which both wait, their service over weight differs by at most twice that.

Pure: no clock, no lock, no thread of its own."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
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


DEFAULT_WEIGHT = 1.0


class FairScheduler:
    """The order of the queue. ``WorkQueue`` calls it under its lock, with its own clock's time in seconds.

    Batches hold up to ``max_tokens``, of whatever deltas, work counting as ``cost + bend · squares``; work beyond that
    goes alone. A batch ends at the first piece that does not fit, so that nothing overtakes it. Beyond ``hurried``
    tokens it only grows while all in it are answered before their deadlines, if it takes ``seconds(size)``. ``weights``
    are by delta, 1 for those not named. ``total`` counts what waits.
    """

    def __init__(self, max_tokens: int, weights: Mapping[str, float] | None = None) -> None:
        self.max_tokens: float = max_tokens
        self.hurried: float = max_tokens
        self.seconds: Callable[[float], float] = lambda size: 0.0
        self.bend = 0.0
        self._weights = dict(weights or {})
        self.total = Tally()
        self._lanes: dict[str, DeltaQueue] = {}
        self._queue: list[tuple[float, int, DeltaQueue]] = []  # a heap over the lanes that wait; empty lanes are stale
        self._order = itertools.count()
        self._floor = 0.0
        self._spent: dict[str, float] = {}  # counters above the floor of deltas that do not wait now

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Changes some weights; what has been charged stays charged."""
        self._weights.update(weights)
        for name in weights.keys() & self._lanes.keys():
            self._lanes[name].weight = weights[name]

    def waiting(self, delta: str) -> int:
        """Tokens that wait for one delta."""
        lane = self._lanes.get(delta)
        return lane.waiting.tokens if lane else 0

    def share(self, delta: str) -> float:
        """The part of the service that a delta would get now, beside those that wait."""
        others = sum(lane.weight for name, lane in self._lanes.items() if name != delta)
        own = self._weights.get(delta, DEFAULT_WEIGHT)
        return own / (own + others)

    def counters(self) -> dict[str, float]:
        """The counters of the deltas that wait."""
        return {name: lane.counter for name, lane in self._lanes.items()}

    def push(self, work: Work) -> None:
        """Takes in one piece of waiting work."""
        lane = self._lanes.get(work.delta)
        if lane is None:
            lane = self._opened(work.delta)
        lane.push(work)

    def pick(self, now: float) -> list[Work]:
        """Removes and returns the next batch, work of any deltas together; empty when nothing waits."""
        batch: list[Work] = []
        filled, soonest = 0.0, math.inf
        while self._queue:
            lane = self._queue[0][2]
            work = lane.first(now)
            if work is None:
                heapq.heappop(self._queue)
                self._closed(lane)
                continue
            size = work.cost + self.bend * work.squares
            soonest = min(soonest, work.deadline)
            in_time = now + self.seconds(filled + size) <= soonest
            if batch and filled + size > (self.max_tokens if in_time else self.hurried):
                break
            self._floor = lane.counter
            batch.append(lane.take())
            filled += size
            if lane.waiting.items:
                heapq.heapreplace(self._queue, (lane.counter, next(self._order), lane))
            else:
                heapq.heappop(self._queue)
                self._closed(lane)
        return batch

    def drop(self, work: Work) -> None:
        """Forgets one piece of waiting work."""
        lane = self._lanes[work.delta]
        lane.drop(work)
        if not lane.waiting.items:
            self._closed(lane)

    def _opened(self, name: str) -> DeltaQueue:
        """A lane for a delta that begins to wait, lifted to those that wait already."""
        while self._queue and not self._queue[0][2].waiting.items:
            heapq.heappop(self._queue)
        lowest = self._queue[0][0] if self._queue else self._floor
        counter = max(self._spent.pop(name, 0.0), lowest)
        weight = self._weights.get(name, DEFAULT_WEIGHT)
        lane = self._lanes[name] = DeltaQueue(name, weight, counter, self.total)
        heapq.heappush(self._queue, (counter, next(self._order), lane))
        return lane

    def _closed(self, lane: DeltaQueue) -> None:
        """Nothing of a delta waits any more. What it has spent beyond the others is remembered while others wait."""
        if self._lanes.get(lane.name) is lane:
            del self._lanes[lane.name]
            self._spent[lane.name] = lane.counter
        if not self._lanes:
            self._spent.clear()
            self._floor = 0.0
        elif len(self._spent) > 2 * len(self._lanes) + 64:
            self._spent = {name: spent for name, spent in self._spent.items() if spent > self._floor}
