"""The bounded queue between the calls and the executor, in tokens, and how long a batch of so many takes.

Seconds = a + b·tokens + c·Σlen², found at start-up, refitted as batches run. ``c / b`` is how much more a token of a
longer sequence costs, which is the model's own; it is found at start-up. A batch's size is then
``tokens + (c / b)·Σlen²``, and what is refitted is a line over sizes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from bertology_serve.errors import Overloaded, RateLimited
from bertology_serve.serving.batching.scheduler import CallItem, FairScheduler, ItemState

Sample = tuple[int, int, float]  # tokens, Σlen², seconds
FIRST_GUESS: tuple[Sample, ...] = ((0, 0, 0.002), (1000, 0, 0.102))  # before anything was measured
FADES = 0.98  # what a batch weighs after the next one: the last fifty count
WHOLE = 5  # a batch of the budget's size takes at least so many times as long as its fixed part
WILDEST = 4.0  # a batch counts as at most so many times as long as expected
Sums = tuple[float, float, float, float, float]  # weight, sums of x, y, xx, xy
NO_SUMS: Sums = (0.0, 0.0, 0.0, 0.0, 0.0)


class BatchTimes:
    """A least-squares line over measured ``(size, seconds)``, older batches fading; and the budget that follows.

    ``cap`` is the seconds that a batch may take, ``most`` the size that it may have at all. The measurements of the
    start stay in with the weight of one each, so that batches of always the same size do not turn the line.
    ``bend`` is c / b.

    The budget is what fits into the cap, and never so little that a batch's fixed part, as it was at the start, is more
    than a fifth of it: a large encoder reads its weights once a batch, and small batches would only make everything
    wait longer. ``hurried`` is what fits into the cap alone, for batches with work whose deadline is near.
    """

    def __init__(self, cap: float, most: int, ladder: Iterable[Sample] = FIRST_GUESS) -> None:
        self.cap, self.most = cap, most
        self.start(ladder)

    def start(self, ladder: Iterable[Sample]) -> None:
        rungs = list(ladder)
        self.bend = bend_of(rungs)
        self._ladder = _sums([(self.size(tokens, squares), seconds) for tokens, squares, seconds in rungs])
        self._recent, self._least = NO_SUMS, 0.0
        self._fit()
        self._least = (WHOLE - 1) * self.fixed / self.per_token
        self._fit()

    def size(self, tokens: float, squares: float) -> float:
        """The size of a batch of sequences whose lengths' squares sum to ``squares``."""
        return tokens + self.bend * squares

    def observe(self, size: float, seconds: float) -> None:
        y = min(seconds, WILDEST * self.seconds(size))
        weight, xs, ys, xxs, xys = self._recent
        self._recent = (
            FADES * weight + 1.0,
            FADES * xs + size,
            FADES * ys + y,
            FADES * xxs + size * size,
            FADES * xys + size * y,
        )
        self._fit()

    def seconds(self, size: float) -> float:
        return self.fixed + self.per_token * size

    @property
    def rate(self) -> float:
        """Tokens a second in batches of the budget's size, if they are short sequences'."""
        return self.budget / self.seconds(self.budget)

    def _fit(self) -> None:
        (weight, x, y, xx, xy), (more, xs, ys, xxs, xys) = self._ladder, self._recent
        weight, x, y, xx, xy = weight + more, x + xs, y + ys, xx + xxs, xy + xys
        spread = xx - x * x / weight
        slope = (xy - x * y / weight) / spread if spread > 0 else 0.0
        through_zero = y / x
        if not 0 < slope <= through_zero:  # noise: no line falls, none starts below zero
            slope = through_zero
        self.per_token, self.fixed = max(slope, 1e-9), max(0.0, (y - slope * x) / weight)
        fits = (self.cap - self.fixed) / self.per_token
        self.hurried, self.budget = (max(1, min(self.most, int(size))) for size in (fits, max(fits, self._least)))


def bend_of(rungs: list[Sample]) -> float:
    """c / b of the plane through measurements; 0 where they are no plane that rises, or all of like lengths."""
    table = np.array([(1.0, tokens, squares) for tokens, squares, _ in rungs])
    if np.linalg.matrix_rank(table / np.maximum(table.max(axis=0), 1.0)) < table.shape[1]:
        return 0.0
    _, slope, curve = np.linalg.lstsq(table, np.array([seconds for *_, seconds in rungs]), rcond=None)[0].tolist()
    longest = max(squares / tokens for tokens, squares, _ in rungs if tokens)
    return min(curve / slope, 1 / longest) if slope > 0 and curve > 0 else 0.0  # noise: no token costs twice as much


def _sums(points: list[tuple[float, float]]) -> Sums:
    return (
        float(len(points)),
        sum(x for x, _ in points),
        sum(y for _, y in points),
        sum(x * x for x, _ in points),
        sum(x * y for x, y in points),
    )


LONGEST_WAIT = 60.0
NOTHING: Mapping[str, int] = MappingProxyType({})
OPEN_AGAIN = 7 / 8  # of the queue's size: a full queue takes no calls until it is down to this


class WorkQueue:
    """Work waits here until a batch takes it. Thread-safe; ``clock`` gives seconds.

    ``put`` takes all of a call's work or none of it: at most ``max_tokens`` wait, and ``max_delta_tokens`` for one
    delta, so that a flood for one leaves room for the others. ``times`` learns how long batches take and says how large
    the next one may be.

    A queue that had to refuse a call for being nearly full refuses all until an eighth of it is free, that of a delta
    likewise: ``check`` then says so before a call is read, and no work is done that ends in a refusal.
    """

    def __init__(
        self,
        scheduler: FairScheduler,
        times: BatchTimes,
        max_tokens: int,
        max_delta_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_tokens, self.max_delta_tokens = max_tokens, max_delta_tokens or max_tokens
        self.times = times
        self._scheduler, self._clock = scheduler, clock
        self._changed = threading.Condition()
        self._closed = self._full = False
        self._shut = set[str]()
        self._running: dict[int, int] = {}
        self.takers = 1  # threads that take batches

    @property
    def items(self) -> int:
        return self._scheduler.total.items

    @property
    def tokens(self) -> int:
        return self._scheduler.total.tokens

    @property
    def running(self) -> int:
        """Items of the batches that were taken last, each until its thread waits for the next."""
        return sum(list(self._running.values()))

    def put(self, items: Sequence[CallItem], charge: Callable[[int], None] | None = None) -> None:
        """Queues a call's work. Overloaded when it does not fit or the server is stopping; RateLimited when there is
        room, but not for that delta.

        ``charge(tokens)`` hears what it costs once there is room, so that nobody pays for a refusal; it may raise.
        """
        costs = _costs(items)
        with self._changed:
            self._check(costs)
            if charge is not None:
                charge(sum(costs.values()))
            now = self._clock()
            for item in items:
                item.arrived = now
                self._scheduler.push(item)
            self._changed.notify()

    def check(self, costs: Mapping[str, int] = NOTHING) -> None:
        """Raises what ``put`` would for work of these tokens by delta."""
        with self._changed:
            self._check(costs)

    def _check(self, costs: Mapping[str, int]) -> None:
        if self._closed:
            raise Overloaded("the server is stopping; send the call to another one", retry_after=1.0)
        cost, room = sum(costs.values()), OPEN_AGAIN * self.max_tokens
        self._full = self._full and self.tokens > room
        if self._full or self.tokens + cost > self.max_tokens:
            self._full = self.tokens > room
            wait = self._seconds(self.tokens)
            raise Overloaded(
                f"the queue is full: {self.tokens} of {self.max_tokens} tokens wait, {cost} more are not taken now; "
                f"try again in {math.ceil(wait)} s",
                retry_after=wait,
            )
        for delta, own in costs.items():
            self._check_delta(delta, own)

    def _check_delta(self, delta: str, cost: int) -> None:
        queue, room = self._scheduler.queues.get(delta), OPEN_AGAIN * self.max_delta_tokens
        waiting = queue.waiting.tokens if queue else 0
        if waiting <= room:
            self._shut.discard(delta)
        if delta in self._shut or waiting + cost > self.max_delta_tokens:
            if waiting > room:
                self._shut.add(delta)
            wait = self._seconds(min(waiting / self._scheduler.share(delta), self.tokens))
            raise RateLimited(
                f"the queue of delta {delta!r} is full: {waiting} of {self.max_delta_tokens} tokens wait, {cost} more "
                f"are not taken now; try again in {math.ceil(wait)} s",
                retry_after=wait,
            )

    def _seconds(self, tokens: float) -> float:
        """How long that many tokens take, within reason."""
        return min(max(tokens / (self.takers * self.times.rate), 1.0), LONGEST_WAIT)

    def waiting(self) -> list[str]:
        with self._changed:
            return list(self._scheduler.counters())

    def weigh(self, weights: Mapping[str, float]) -> None:
        with self._changed:
            self._scheduler.weigh(weights)

    def take(self) -> list[CallItem]:
        """The next batch; waits for one. Empty once the queue is closed and everything in it was taken."""
        taker = threading.get_ident()
        with self._changed:
            self._running.pop(taker, None)
            while True:
                batch = self._scheduler.pick(self._clock())
                if batch:
                    self._running[taker] = len(batch)
                    if self.items:  # what one call put in may be enough for another taker
                        self._changed.notify()
                    return batch
                if self._closed:
                    return []
                self._changed.wait()

    def cancel(self, items: Iterable[CallItem]) -> int:
        """Takes out items that nobody waits for any more and returns how many that spared."""
        with self._changed:
            waiting = [item for item in items if item.state is ItemState.WAITING]
            for item in waiting:
                self._scheduler.cancel(item)
            return len(waiting)

    def served(self, items: Sequence[CallItem], seconds: float) -> None:
        """Tells the queue how long a batch took; the next are as large as fits into the time that they may take."""
        times, scheduler = self.times, self._scheduler
        with self._changed:
            times.observe(sum([one.size(times.bend, one.spared) for one in items]), seconds)
            scheduler.max_tokens, scheduler.hurried = times.budget, min(times.hurried, times.budget)
            scheduler.seconds, scheduler.bend = times.seconds, times.bend

    def close(self) -> None:
        """Takes no more work; what is queued is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _costs(items: Sequence[CallItem]) -> dict[str, int]:
    """Tokens by delta."""
    costs: dict[str, int] = {}
    for item in items:
        costs[item.delta] = costs.get(item.delta, 0) + item.charged
    return costs
