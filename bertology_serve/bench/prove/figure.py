"""The nouns of a proof: a promise, and what was measured beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bertology_serve.bench.prove.stage import Stage


@dataclass(frozen=True)
class Measured:
    """What came out: in words, whether the promise holds, and the numbers."""

    words: str
    holds: bool
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One promise; ``measure`` finds out."""

    number: int
    promise: str
    measure: Callable[[Stage], Measured]


@dataclass(frozen=True)
class Line:
    """One line of the proof; ``cpu_seconds`` are of this process and the servers that it started."""

    number: int
    promise: str
    measured: Measured
    seconds: float
    cpu_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "number": self.number,
            "promise": self.promise,
            "measured": self.measured.words,
            "holds": self.measured.holds,
            "facts": dict(self.measured.facts),
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
        }


def prove(figure: Figure, stage: Stage) -> Line:
    """Measures one figure."""
    wall, cpu = time.perf_counter(), time.process_time() + stage.served_cpu
    measured = figure.measure(stage)
    spent = time.process_time() + stage.served_cpu - cpu
    return Line(figure.number, figure.promise, measured, time.perf_counter() - wall, spent)
