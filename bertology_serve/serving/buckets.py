"""Token buckets: so much a second on average, so much at once."""

from __future__ import annotations

import math


class Bucket:
    """Refilled at ``rate`` units a second up to ``burst``. Belongs to one thread; the caller brings the time.

    What is larger than the whole bucket passes when the bucket is full and leaves it in debt, so that every size is
    served and the average holds.
    """

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self.rate, self.burst = rate, rate if burst is None else burst
        self._level, self._seen = self.burst, -math.inf

    def take(self, amount: float, now: float) -> float:
        """0 where ``amount`` was taken; else the seconds until it could be, and nothing is taken."""
        self._level = min(self.burst, self._level + self.rate * (now - self._seen))
        self._seen = now
        missing = min(amount, self.burst) - self._level
        if missing > 1e-9:
            return missing / self.rate
        self._level -= amount
        return 0.0
