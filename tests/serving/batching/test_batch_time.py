from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.serving.batching.queue import BatchTimes

RUNGS = st.builds(
    lambda length, count, seconds: (length * count, length**2 * count, seconds),
    st.integers(1, 512), st.integers(1, 64), st.floats(0, 100),
)  # fmt: skip
LADDER = [(size, 20 * size, 0.002 + 0.0001 * size) for size in (32, 64, 128, 256, 512)]


def test_the_line_through_exact_measurements_and_the_budget_that_follows():
    times = BatchTimes(0.05, 10_000, LADDER)
    assert times.fixed == pytest.approx(0.002)
    assert times.per_token == pytest.approx(0.0001)
    assert times.budget == pytest.approx(480, abs=1)
    assert times.seconds(100) == pytest.approx(0.012)
    assert times.rate == pytest.approx(9600, rel=0.01)


def test_the_budget_stays_within_its_bounds():
    assert BatchTimes(0.05, 100, LADDER).budget == 100
    times = BatchTimes(1e-5, 100, [(size, 0, 0.0001 * size) for size in (32, 64)])
    assert (times.budget, times.hurried) == (1, 1)


@pytest.mark.parametrize(
    ("cap", "fixed", "per_token", "budget", "hurried"),
    [
        (0.05, 0.0245, 0.00055, 178, 46),  # 110 M parameters on two cores: batches of 46 tokens would half be waiting
        (0.05, 0.010, 0.0001, 400, 400),
        (0.05, 0.2, 0.0001, 8000, 1),
        (0.001, 0.002, 0.0001, 80, 1),
    ],
)
def test_the_fixed_part_is_at_most_a_fifth_of_a_batch(cap, fixed, per_token, budget, hurried):
    times = BatchTimes(cap, 10_000, [(size, 0, fixed + per_token * size) for size in (32, 64, 512)])
    assert times.budget == pytest.approx(budget, abs=1)
    assert times.hurried == pytest.approx(hurried, abs=1)
    assert times.fixed <= times.seconds(times.budget + 1) / 5


def test_a_machine_that_slows_down_gets_smaller_batches_and_recovers():
    times = BatchTimes(0.05, 10_000, LADDER)
    for _ in range(300):
        times.observe(times.budget, 3 * (0.002 + 0.0001 * times.budget))
    assert times.budget == pytest.approx(160, rel=0.25)
    for _ in range(600):
        times.observe(times.budget, 0.002 + 0.0001 * times.budget)
    assert times.budget == pytest.approx(480, rel=0.1)


def test_batches_of_one_size_do_not_turn_the_line():
    times = BatchTimes(0.05, 10_000, LADDER)
    for number in range(500):
        times.observe(10, 0.003 + 0.0002 * (number % 3 - 1))
    assert times.budget == pytest.approx(480, rel=0.1)


def test_an_older_batch_weighs_0_98_of_the_next_one():
    """The line is that of weighted least squares: the ladder's rungs once each, batches by their age."""
    times = BatchTimes(0.05, 10_000, LADDER)
    rungs = [(times.size(tokens, squares), seconds) for tokens, squares, seconds in LADDER]
    sizes = [100.0 + 40 * (number % 7) for number in range(60)]
    batches = [(size, (0.01 + 0.0001 * size) * (1 + number / 60)) for number, size in enumerate(sizes)]
    seen = []
    for size, seconds in batches:
        seen.append((size, min(seconds, 4 * times.seconds(size))))
        times.observe(size, seconds)
    x, y = np.array(rungs + seen).T
    weights = np.array([1.0] * len(rungs) + [0.98**age for age in reversed(range(len(seen)))])
    slope, fixed = np.polyfit(x, y, 1, w=np.sqrt(weights))
    assert slope > 0
    assert fixed > 0.005
    assert (times.per_token, times.fixed) == (pytest.approx(slope, rel=1e-6), pytest.approx(fixed, rel=1e-6))


def test_one_stall_counts_a_little():
    times = BatchTimes(0.05, 10_000, LADDER)
    for _ in range(50):
        times.observe(400, 0.042)
    times.observe(400, 30.0)
    assert times.budget > 400


@given(st.lists(RUNGS, min_size=1, max_size=50))
def test_whatever_is_measured_the_budget_is_usable(points):
    times = BatchTimes(0.05, 1000, points)
    assert 0 <= times.bend <= 1
    for tokens, squares, seconds in points:
        times.observe(times.size(tokens, squares), seconds)
        assert 1 <= times.budget <= 1000
        assert times.fixed >= 0
        assert times.per_token > 0
        assert times.rate > 0


def test_what_long_sequences_cost_more_is_found():
    """1 ms, 20 µs a token, and for a sequence of 256 tokens half as much again."""
    shapes = [(20, count) for count in (1, 2, 4, 8, 16)] + [(256, count) for count in (1, 2, 4)]
    rungs = [(n * k, n * n * k, 1e-3 + 2e-5 * (n * k) * (1 + n / 512)) for n, k in shapes]
    times = BatchTimes(0.05, 10_000, rungs)
    assert times.bend == pytest.approx(1 / 512)
    for tokens, squares, seconds in rungs:
        assert times.seconds(times.size(tokens, squares)) == pytest.approx(seconds)
    for _ in range(500):  # as it runs: a machine half as fast is learned from short and long batches alike
        for tokens, squares, seconds in rungs:
            times.observe(times.size(tokens, squares), 2 * seconds)
    assert times.seconds(times.size(512, 2 * 256**2)) == pytest.approx(2 * (1e-3 + 2e-5 * 512 * 1.5), rel=0.1)


@pytest.mark.parametrize("curve", [-1e-7, 0.0])
def test_long_sequences_that_cost_no_more(curve):
    rungs = [(n * k, n * n * k, 1e-3 + 2e-5 * n * k + curve * n * n * k) for n in (20, 200) for k in (1, 2, 3)]
    assert BatchTimes(0.05, 10_000, rungs).bend == pytest.approx(0, abs=1e-6)
