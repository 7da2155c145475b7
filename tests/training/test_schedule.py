from __future__ import annotations

import pytest

from bertology_serve.training.methods import factor


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rises_to_one_and_every_step_learns(schedule):
    shares = [factor(step, 100, 0.06, schedule) for step in range(100)]
    assert shares[:7] == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1.0])
    assert min(shares) > 0
    assert max(shares) == 1.0


def test_linear_and_cosine_fall_to_zero_at_the_end():
    assert factor(100, 100, 0.06, "linear") == 0.0
    assert factor(100, 100, 0.06, "cosine") == pytest.approx(0.0)
    assert factor(53, 100, 0.06, "linear") == pytest.approx(0.5)
    assert factor(53, 100, 0.06, "cosine") == pytest.approx(0.5)
    assert factor(30, 100, 0.06, "cosine") > factor(30, 100, 0.06, "linear")


def test_constant_stays():
    assert factor(99, 100, 0.0, "constant") == 1.0


def test_one_step_and_whole_warmup():
    assert factor(0, 1, 0.0, "linear") == 1.0
    assert factor(9, 10, 1.0, "linear") == pytest.approx(10 / 11)
