"""How sure a number is: bootstrap intervals over items, and McNemar's test. Seeded: the same answer each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bertology_serve.tasks.metrics import Floats

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def points(self) -> str:
        """Signed, as points of a hundred: ``+1.2 [-0.3, +2.6]``."""
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    @property
    def is_sure(self) -> bool:
        """Whether it is not 0."""
        return self.low > 0 or self.high < 0


def bootstrap(count: int, statistic: Callable[[NDArray[np.int64]], float]) -> Interval:
    """The percentile interval of a statistic of ``count`` items, which gets the numbers of those drawn (Efron 1979).

    It is moved by as much as resampling itself moves the statistic: a calibration error, say, is larger on items that
    are drawn twice. A difference of two metrics on the same items is a paired bootstrap (Koehn 2004).
    """
    value, found = statistic(np.arange(count)), np.array([statistic(drawn) for drawn in _draws(count)])
    low, high = np.percentile(found, (2.5, 97.5)) - (found.mean() - value)
    return Interval(value, float(low), float(high))


def _draws(count: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(0)
    return (generator.integers(0, count, count) for _ in range(RESAMPLES))


def mcnemar(first: int, second: int) -> float:
    """The exact two-sided probability of a split at least as uneven, were both right equally often (McNemar 1947)."""
    total, fewer = first + second, min(first, second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


def paired_effect(differences: Floats) -> float:
    """Cohen's d of paired differences: their mean in units of their standard deviation; 0 where there are none."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return float(differences.mean()) / spread if spread else 0.0
