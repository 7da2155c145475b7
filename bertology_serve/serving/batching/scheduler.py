"""Which of the waiting work makes the next batch: fair between deltas, earliest deadline first within each.

Virtual token counters (VTC; Sheng et al., Fairness in Serving Large Language Models, OSDI 2024), which are exact here:
an encoder's cost is known on arrival. Each delta that waits has a counter of tokens served over its weight; the lowest
goes next, and is charged as it goes. A delta that begins to wait is lifted to the lowest counter of those that wait, so
that idling earns no credit. For any two deltas that wait, the counters differ by at most ``max(cost / weight)`` of one
piece of work; over any time in which both wait, their service over weight differs by at most twice that.

Pure: no clock, no lock, no thread of its own.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping

from bertology_serve.serving.batching.delta_queue import DeltaQueue, Tally, Work

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
