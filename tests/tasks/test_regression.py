from __future__ import annotations

import numpy as np
import pytest
import torch

from bertology_serve.errors import DataError
from bertology_serve.tasks.regression import Regression
from bertology_serve.tasks.spec import TaskSpec

TASK = Regression(TaskSpec("regression"))


def test_value_and_squared_error():
    assert TASK.decode(TASK.example({"text": "x"}, "x:1", False), [], [torch.tensor([2.5])]) == {"value": 2.5}
    assert TASK.loss(torch.tensor([[1.0], [4.0]]), [1, 1], [3.0, 3.0]).item() == 5.0


@pytest.mark.parametrize(
    "record",
    [
        {"score": 3},
        {"label": 3.0},
        {"score": "3", "label": "?"},
        {"label": " 3.0 "},
        {"score": ".3e+1"},
        {"score": np.int64(3)},
    ],
)
def test_score_or_label_holds_the_number(record):
    example = TASK.example({"text": "x", **record}, "x:1", True)
    assert TASK.target(example, []) == 3.0


@pytest.mark.parametrize(
    "score",
    [
        True,
        "high",
        float("nan"),
        float("inf"),
        "nan",
        "-inf",
        [1],
        {},
        "",
        10**400,
        "1_5",
        "\uff11",
        "infinity",
        " nan",
    ],
)
def test_what_is_no_finite_number_is_refused(score):
    with pytest.raises(DataError, match=r"^x:4: field 'score' is .*; expected a finite number"):
        TASK.example({"text": "x", "score": score}, "x:4", True)


def test_metrics():
    examples = [TASK.example({"text": "x", "score": score}, "x:1", True) for score in (0, 1, 5)]
    metrics = TASK.metrics([{"value": value} for value in (1.0, 2.0, 3.0)], examples)
    assert metrics["spearman"] == pytest.approx(1.0)
    assert metrics["pearson"] == pytest.approx(0.9449, abs=1e-4)
    assert metrics["mse"] == pytest.approx(2.0)


def test_real_pairs(real_data):
    examples = [TASK.example(fields, where, True) for fields, where in real_data("stsb", "dev", 200)]
    assert all(0 <= example.score <= 5 and example.text_pair for example in examples)
