from __future__ import annotations

import numpy as np
import pytest

from bertology_serve.errors import SpecError
from bertology_serve.tasks.embedding import EmbeddingExample
from bertology_serve.training.negatives import Mining, mine

ANGLES = {"a": 0, "b": 90, "p": 5, "p2": 10, "n1": 20, "n2": 40, "n3": 60, "q": 80}
PAIRS = [EmbeddingExample("x:1", "a", "p"), EmbeddingExample("x:2", "a", "p2"), EmbeddingExample("x:3", "b", "q")]


def embed(texts, role):
    assert role == ("query" if texts == ["a", "b"] else "document")
    turns = np.radians([ANGLES[text] for text in texts])
    return np.stack([np.cos(turns), np.sin(turns)], 1).astype(np.float32)


def mined(**values):
    return [negatives for _, negatives in mine(PAIRS, ["n1", "n2", "n3", "a"], Mining(**values), embed)]


def test_the_nearest_that_do_not_belong():
    """Neither pair of ``a`` is its negative, nor ``a`` itself."""
    assert mined(negatives=2) == [["n1", "n2"], ["n1", "n2"], ["n3", "n2"]]
    assert mined(negatives=99)[0] == ["n1", "n2", "n3", "q"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"range_min": 1}, ["n2", "n3", "q"]),
        ({"range_max": 2}, ["n1", "n2"]),
        ({"range_min": 1, "range_max": 2}, ["n2"]),
        ({"margin": float(np.cos(np.radians(5)) - np.cos(np.radians(30)))}, ["n2", "n3", "q"]),
        ({"relative_margin": 0.5}, ["q"]),  # n3 has 0.5, and half of the positive's is 0.498
        ({"max_score": 0.6}, ["n3", "q"]),
        ({"max_score": -0.5}, []),
    ],
)
def test_what_is_near_enough_and_not_too_near(values, expected):
    assert mined(negatives=9, **values)[0] == expected


def test_random_ones_are_drawn_from_the_same_and_repeat():
    first = mined(negatives=2, sampling="random", seed=1)
    assert first == mined(negatives=2, sampling="random", seed=1)
    assert {tuple(mined(negatives=2, sampling="random", seed=seed)[0]) for seed in range(9)} - {("n1", "n2")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"negatives": 0}, "negatives is 0; expected a number from 1 up"),
        ({"range_min": -1}, "range_min is -1; expected a number from 0 up"),
        ({"range_min": 100}, "ranks from 100 to 100 are none; raise range_max"),
        ({"sampling": "any"}, "unknown sampling 'any'"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(SpecError, match=message):
        Mining(**values)
