from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from bertology_serve.tasks import metrics

LABELS = np.array(["a", "b", "c", "d"])


def draws(labels, rows):
    generator = np.random.default_rng(rows)
    return tuple([str(label) for label in generator.choice(labels, rows)] for _ in range(2))


@pytest.mark.parametrize("labels", [2, 3, 4])
@pytest.mark.parametrize("rows", [2, 7, 200])
def test_classification_metrics_equal_scikit_learn(labels, rows):
    gold, found = draws(LABELS[:labels], rows)
    assert metrics.accuracy(gold, found) == pytest.approx(reference.accuracy_score(gold, found))
    expected = reference.f1_score(gold, found, average="macro", zero_division=0)
    assert metrics.macro_f1(gold, found) == pytest.approx(expected)
    assert metrics.mcc(gold, found) == pytest.approx(reference.matthews_corrcoef(gold, found), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy(ties):
    gold, noise = np.random.default_rng(0).normal(size=(2, 60))
    found = gold + noise
    if ties:
        gold, found = gold.round(), found.round()
    assert metrics.pearson(list(gold), list(found)) == pytest.approx(stats.pearsonr(gold, found)[0])
    assert metrics.spearman(list(gold), list(found)) == pytest.approx(stats.spearmanr(gold, found)[0])
    assert metrics.mse(list(gold), list(found)) == pytest.approx(reference.mean_squared_error(gold, found))


def test_undefined_ratios_are_zero():
    assert metrics.pearson([1.0, 2.0], [3.0, 3.0]) == 0.0
    assert metrics.spearman([1.0], [3.0]) == 0.0
    assert metrics.mcc(["a", "b"], ["a", "a"]) == 0.0
    assert metrics.accuracy([], []) == metrics.macro_f1([], []) == metrics.mse([], []) == 0.0
