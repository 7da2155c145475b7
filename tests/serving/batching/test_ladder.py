from __future__ import annotations

from typing import Any

import pytest

from bertology_serve.serving.batching.queue import BatchTimes
from bertology_serve.serving.batching.warmup import LONG, climb


class Machine:
    """1 ms a token, and ``fixed`` seconds; a long text has 240 tokens."""

    def __init__(self, fixed: float = 0.0) -> None:
        self.now, self.sizes, self.fixed = 0.0, [], fixed

    base: Any = None

    def tokenise(self, job: Any) -> None:
        job.cost = 240 if len(job.request.record["text"]) == len(LONG) else 24
        job.squares = job.cost**2

    def run(self, jobs: Any) -> None:
        self.sizes.append(sum(job.cost for job in jobs))
        self.now += self.fixed + 0.001 * self.sizes[-1]


def test_sizes_double_until_a_batch_takes_twice_the_cap():
    machine: Any = Machine()
    rungs = climb(machine, cap=0.15, most=10_000, clock=lambda: machine.now)
    assert [tokens for tokens, _, _ in rungs] == [24, 72, 120, 264, 504, 240, 480]
    assert [squares // tokens for tokens, squares, _ in rungs] == [24] * 5 + [240] * 2
    assert all(abs(seconds - 0.001 * tokens) < 1e-9 for tokens, _, seconds in rungs)
    assert len(machine.sizes) == 3 * len(rungs)


def test_sizes_double_until_the_fixed_part_is_a_small_one():
    machine: Any = Machine(fixed=0.2)
    rungs = climb(machine, cap=0.05, most=10_000, clock=lambda: machine.now)
    assert [tokens for tokens, _, _ in rungs] == [24, 72, 120, 264, 504, 1032, 240, 480, 960]
    assert BatchTimes(0.05, 10_000, rungs).budget == pytest.approx(800, abs=1)


def test_sizes_end_at_the_most():
    machine: Any = Machine()
    assert [tokens for tokens, _, _ in climb(machine, 1e9, 130, lambda: machine.now)] == [24, 72, 120]
    assert len(climb(machine, 1e9, 1, lambda: machine.now)) == 1


def test_on_a_real_encoder(pipeline):
    rungs = climb(pipeline, cap=10.0, most=128)
    assert len({squares / tokens for tokens, squares, _ in rungs}) == 2
    assert all(seconds > 0 for *_, seconds in rungs)
