"""How long a batch takes: seconds = a + b·tokens + c·Σlen². Found at start-up, refitted as batches run.

``c / b`` is how much more a token of a longer sequence costs, which is the model's own; it is found at start-up. A
batch's size is then ``tokens + (c / b)·Σlen²``, and what is refitted is a line over sizes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Sample = tuple[int, int, float]  # tokens, Σlen², seconds
FIRST_GUESS: tuple[Sample, ...] = ((0, 0, 0.002), (1000, 0, 0.102))  # before anything was measured
FADES = 0.98  # what a batch weighs after the next one: the last fifty count
WHOLE = 5  # a batch of the budget's size takes at least so many times as long as its fixed part
WILDEST = 4.0  # a batch counts as at most so many times as long as expected
Sums = tuple[float, float, float, float, float]  # weight, sums of x, y, xx, xy
NOTHING: Sums = (0.0, 0.0, 0.0, 0.0, 0.0)


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
        """Begins anew from measurements of several sizes."""
        rungs = list(ladder)
        self.bend = bend_of(rungs)
        self._ladder = _sums([(self.size(tokens, squares), seconds) for tokens, squares, seconds in rungs])
        self._recent, self._least = NOTHING, 0.0
        self._fit()
        self._least = (WHOLE - 1) * self.fixed / self.per_token
        self._fit()

    def size(self, tokens: float, squares: float) -> float:
        """The size of a batch of sequences whose lengths' squares sum to ``squares``."""
        return tokens + self.bend * squares

    def observe(self, size: float, seconds: float) -> None:
        """Learns from one batch."""
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
        """What a batch of that size is expected to take."""
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
