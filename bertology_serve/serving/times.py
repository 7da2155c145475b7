"""How long a batch takes, as a line: seconds = a + b·tokens. Found at start-up, refitted as batches run."""

from __future__ import annotations

from collections.abc import Iterable

FIRST_GUESS = ((0, 0.002), (1000, 0.102))  # before anything was measured
FADES = 0.98  # what a batch weighs after the next one: the last fifty count
WILDEST = 4.0  # a batch counts as at most so many times as long as expected


class BatchTimes:
    """A least-squares line over measured ``(tokens, seconds)``, older batches fading; and the budget that follows.

    ``cap`` is the seconds that a batch may take, ``most`` the tokens that it may hold at all. The measurements of the
    start stay in with the weight of one each, so that batches of always the same size do not turn the line.
    """

    def __init__(self, cap: float, most: int, ladder: Iterable[tuple[int, float]] = FIRST_GUESS) -> None:
        self.cap, self.most = cap, most
        self._recent = [0.0] * 5  # weight, sums of x, y, xx, xy
        self.start(ladder)

    def start(self, ladder: Iterable[tuple[int, float]]) -> None:
        """Begins anew from measurements of several sizes."""
        self._ladder = _sums(ladder)
        self._recent = [0.0] * 5
        self._fit()

    def observe(self, tokens: int, seconds: float) -> None:
        """Learns from one batch."""
        seconds = min(seconds, WILDEST * self.seconds(tokens))
        own = _sums([(tokens, seconds)])
        self._recent = [FADES * old + new for old, new in zip(self._recent, own, strict=True)]
        self._fit()

    def seconds(self, tokens: float) -> float:
        """What a batch of that size is expected to take."""
        return self.fixed + self.per_token * tokens

    @property
    def rate(self) -> float:
        """Tokens a second in batches of the budget's size."""
        return self.budget / self.seconds(self.budget)

    def _fit(self) -> None:
        weight, x, y, xx, xy = (old + new for old, new in zip(self._ladder, self._recent, strict=True))
        spread = xx - x * x / weight
        slope = (xy - x * y / weight) / spread if spread > 0 else 0.0
        through_zero = y / x
        if not 0 < slope <= through_zero:  # noise: no line falls, none starts below zero
            slope = through_zero
        self.per_token, self.fixed = max(slope, 1e-9), max(0.0, (y - slope * x) / weight)
        self.budget = max(1, min(self.most, int((self.cap - self.fixed) / self.per_token)))


def _sums(points: Iterable[tuple[int, float]]) -> list[float]:
    found = [0.0] * 5
    for x, y in points:
        found = [old + new for old, new in zip(found, (1.0, x, y, x * x, x * y), strict=True)]
    return found
