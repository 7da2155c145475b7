"""The waiting work of one delta."""

from __future__ import annotations

import heapq
import itertools

from bertology_serve.serving.work import State, Work

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


class Lane:
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
