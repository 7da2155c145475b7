from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from bertology_serve.tasks import metrics
from bertology_serve.tasks.metrics import exact, normalise, overlap_f1, squad_scores

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


def test_normalising_drops_case_articles_punctuation_and_spaces():
    assert normalise("The  Cat's, an 'A'!") == "cats"
    assert normalise("  Theatre of another ") == "theatre of another"


@pytest.mark.parametrize(
    ("gold", "found", "em", "f1"),
    [
        ("the Denver Broncos", "Denver Broncos", 1.0, 1.0),
        ("Denver Broncos", "Denver", 0.0, 2 / 3),
        ("to be to be", "be", 0.0, 0.4),
        ("Denver", "Carolina", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "Denver", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
    ],
)
def test_scores_by_hand(gold, found, em, f1):
    assert exact(gold, found) == em
    assert overlap_f1(gold, found) == pytest.approx(f1)


def test_the_best_gold_answer_counts_and_none_means_no_answer():
    scores = squad_scores([["308", "308 points"], []], ["308 points", ""])
    assert scores == {"exact": 1.0, "f1": 1.0}
    assert squad_scores([["a b c d", "x"], ["y"]], ["b c", ""]) == {"exact": 0.0, "f1": pytest.approx(0.4)}
