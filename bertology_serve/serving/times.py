"""How long a batch takes, as a line: seconds = a + b·tokens. Found at start-up, refitted as batches run."""

from __future__ import annotations

from collections.abc import Iterable

FIRST_GUESS = ((0, 0.002), (1000, 0.102))  # before anything was measured
FADES = 0.98  # what a batch weighs after the next one: the last fifty count
WILDEST = 4.0  # a batch counts as at most so many times as long as expected
Sums = tuple[float, float, float, float, float]  # weight, sums of x, y, xx, xy
NOTHING: Sums = (0.0, 0.0, 0.0, 0.0, 0.0)


class BatchTimes:
    """A least-squares line over measured ``(tokens, seconds)``, older batches fading; and the budget that follows.

    ``cap`` is the seconds that a batch may take, ``most`` the tokens that it may hold at all. The measurements of the
    start stay in with the weight of one each, so that batches of always the same size do not turn the line.

    Where a batch's fixed part fills the cap, its tokens get as long as that part had at the start, or as the cap:
    batches of one text each would only make everything wait longer on a machine that is too slow for the cap anyway.
    """

    def __init__(self, cap: float, most: int, ladder: Iterable[tuple[int, float]] = FIRST_GUESS) -> None:
        self.cap, self.most = cap, most
        self.start(ladder)

    def start(self, ladder: Iterable[tuple[int, float]]) -> None:
        """Begins anew from measurements of several sizes."""
        self._ladder = _sums(ladder)
        self._recent, self._knee = NOTHING, 0.0
        self._fit()
        self._knee = self.fixed / self.per_token
        self._fit()

    def observe(self, tokens: int, seconds: float) -> None:
        """Learns from one batch."""
        y = min(seconds, WILDEST * self.seconds(tokens))
        weight, xs, ys, xxs, xys = self._recent
        self._recent = (
            FADES * weight + 1.0,
            FADES * xs + tokens,
            FADES * ys + y,
            FADES * xxs + tokens * tokens,
            FADES * xys + tokens * y,
        )
        self._fit()

    def seconds(self, tokens: float) -> float:
        """What a batch of that size is expected to take."""
        return self.fixed + self.per_token * tokens

    @property
    def rate(self) -> float:
        """Tokens a second in batches of the budget's size."""
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
        fits, least = (self.cap - self.fixed) / self.per_token, min(self._knee, self.cap / self.per_token)
        self.budget = max(1, min(self.most, int(max(fits, least))))


def _sums(points: Iterable[tuple[int, float]]) -> Sums:
    points = list(points)
    return (
        float(len(points)),
        sum(x for x, _ in points),
        sum(y for _, y in points),
        sum(x * x for x, _ in points),
        sum(x * y for x, y in points),
    )
