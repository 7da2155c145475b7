from __future__ import annotations

import numpy as np
import pytest

from bertology_serve.tasks.metrics import Interval, bootstrap, mcnemar, paired_effect


def test_mcnemar_is_the_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for first, second in ((0, 0), (3, 9), (12, 13), (40, 10)):
        expected = stats.binomtest(min(first, second), first + second).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected)


def test_the_bootstrap_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    ours = bootstrap(400, lambda drawn: float(values[drawn].mean()))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.02)
    assert ours == bootstrap(400, lambda drawn: float(values[drawn].mean()))
    assert ours.is_sure
    assert Interval(0.012, -0.003, 0.026).points == "+1.2 [-0.3, +2.6]"


def test_effect_is_cohen_s() -> None:
    values = np.array([1.0, 0.0, 2.0, 1.0])
    assert paired_effect(values) == pytest.approx(1.0 / np.std([1, 0, 2, 1], ddof=1))
    assert paired_effect(np.zeros(3)) == 0


def test_an_interval_of_a_statistic_that_resampling_raises_holds_its_value() -> None:
    """|mean| near 0 grows with noise, as a calibration error does."""
    values = np.random.default_rng(3).normal(0.0, 1.0, 200)
    values -= values.mean() - 0.01
    found = bootstrap(200, lambda drawn: float(abs(values[drawn].mean())))
    assert found.low <= found.value <= found.high


def test_an_interval_ends_where_the_metric_does() -> None:
    """19 of 20 right: moved by the resamples' mean, its upper end would be above 1."""
    values = np.array([1.0] * 19 + [0.0])
    found = bootstrap(20, lambda drawn: float(values[drawn].mean()))
    assert 0 < found.low < found.value < found.high == 1
    below = bootstrap(20, lambda drawn: -float(values[drawn].mean()), (-1.0, 1.0))
    assert (below.low, below.high) == (-1, -found.low)
