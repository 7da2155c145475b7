from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bertology_serve.serving.ladder import climb


class Machine:
    """1 ms a token."""

    def __init__(self) -> None:
        self.now, self.sizes = 0.0, []

    def prepare(self, request: Any) -> Any:
        return SimpleNamespace(cost=24)

    def run(self, jobs: Any) -> None:
        self.sizes.append(24 * len(jobs))
        self.now += 0.001 * self.sizes[-1]


def test_sizes_double_until_a_batch_takes_twice_the_cap():
    machine: Any = Machine()
    rungs = climb(machine, cap=0.1, most=10_000, clock=lambda: machine.now)
    assert [tokens for tokens, _ in rungs] == [24, 72, 120, 264]
    assert all(abs(seconds - 0.001 * tokens) < 1e-9 for tokens, seconds in rungs)
    assert len(machine.sizes) == 3 * len(rungs)


def test_sizes_end_at_the_most():
    machine: Any = Machine()
    assert [tokens for tokens, _ in climb(machine, 1e9, 130, lambda: machine.now)] == [24, 72, 120]
    assert len(climb(machine, 1e9, 1, lambda: machine.now)) == 1


def test_on_a_real_encoder(pipeline):
    rungs = climb(pipeline, cap=10.0, most=128)
    assert len(rungs) == 3
    assert all(seconds > 0 for _, seconds in rungs)
