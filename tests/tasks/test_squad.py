from __future__ import annotations

import pytest

from bertology_serve.tasks.question_answering import exact, normalise, overlap_f1, squad_scores


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
