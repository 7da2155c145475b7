"""Interleaved timing: every round runs every contender once, so that a machine's moods strike all of them.

What ran before leaves its traces in caches, so the order is another one in each round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

WARM_UP = 3


class Contender(Protocol):
    """What is timed: ``run`` does the whole work once."""

    @property
    def name(self) -> str:
        """As tables call it."""
        ...

    @property
    def run(self) -> Callable[[], Any]:
        """The work."""
        ...


@dataclass(frozen=True)
class Timed:
    """``seconds`` and ``cpu_seconds`` (all threads together) of each round.

    On a machine that does other things at the same time, the latter are what can still be compared.
    """

    name: str
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round in seconds."""
        return median(self.seconds)


def interleave(contenders: Sequence[Contender], rounds: int, advance: Callable[[], None] = lambda: None) -> list[Timed]:
    """Times of ``rounds`` rounds after a warm-up; each round in an order of its own, the same ones every time."""
    for contender in contenders:
        for _ in range(WARM_UP):
            contender.run()
    rounds_of: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in random.Random(number).sample(contenders, len(contenders)):
            wall, cpu = time.perf_counter(), time.process_time()
            contender.run()
            rounds_of[contender.name].append((time.perf_counter() - wall, time.process_time() - cpu))
        advance()
    return [
        Timed(name, tuple(wall for wall, _ in found), tuple(cpu for _, cpu in found))
        for name, found in rounds_of.items()
    ]


def ratio(slow: Timed, fast: Timed, cpu: bool = False) -> float:
    """How many times as long ``slow`` takes: the median over rounds of the ratio within each round."""
    pairs = (
        zip(slow.cpu_seconds, fast.cpu_seconds, strict=True) if cpu else zip(slow.seconds, fast.seconds, strict=True)
    )
    return median(a / b for a, b in pairs)
