from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.tasks.classification import Classification
from bertology_serve.tasks.metrics import calibration_error
from bertology_serve.tasks.multi_label import MultiLabel
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.calibration import Settled, settled, thresholds
from bertology_serve.training.evaluation import evaluate, run
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig
from tests.training import sets

TASKS = {
    "classification": Classification(TaskSpec("classification", ("a", "b", "c"))),
    "multi-label": MultiLabel(TaskSpec("multi-label", ("a", "b", "c"))),
}


def drawn(kind: str, rows: int) -> tuple[torch.Tensor, list]:
    """Logits, and targets that their probabilities drew."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, 3, generator=generator)
    if kind == "classification":
        return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).flatten().tolist()
    gold = (torch.rand(rows, 3, generator=generator) < logits.sigmoid()).double()
    return logits, torch.cat([gold, 1 - gold], 1).tolist()


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("true", [0.25, 1.0, 5.0])
def test_a_temperature_is_found_again(kind: str, true: float):
    logits, targets = drawn(kind, 20_000)
    assert TASKS[kind].temperature(logits * true, targets) == pytest.approx(true, rel=0.04)


@pytest.mark.parametrize("kind", TASKS)
def test_it_is_the_optimum(kind: str):
    optimize = pytest.importorskip("scipy.optimize")
    logits, targets = drawn(kind, 200)

    def cost(t: float) -> float:
        return float(TASKS[kind].loss(3 * logits * math.exp(-t), [], targets)) + t * t / 2

    expected = optimize.minimize_scalar(cost, bounds=(-4, 4), method="bounded", options={"xatol": 1e-6}).x
    assert math.log(TASKS[kind].temperature(3 * logits, targets)) == pytest.approx(expected, abs=2e-3)


def test_a_few_right_rows_do_not_make_scores_certain():
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 4)
    by = TASKS["classification"].temperature(logits, [0] * 4)
    assert 0.2 < by < 1
    assert (logits / by).softmax(1)[0, 0] < 0.999


def test_ece_is_what_the_bins_say():
    certainty = np.array([[0.95, 1.0], [0.95, 0.0], [0.55, 1.0], [1.0, 1.0]])
    assert calibration_error(certainty) == pytest.approx((abs(1 + 0 + 1 - 2.9) + 0.45) / 4)
    logits, targets = drawn("classification", 20_000)
    scores, best = logits.double().softmax(1).max(1)
    right = best == torch.tensor(targets)
    assert calibration_error(torch.stack([scores, right.double()], 1).numpy()) < 0.015


def test_thresholds_raise_micro_f1_where_scores_are_off():
    generator = np.random.default_rng(0)
    gold = generator.random((500, 3)) < (0.5, 0.2, 0.01)
    scores = np.clip(np.where(gold, 0.6, 0.3) + generator.normal(0, 0.15, gold.shape), 0, 1) * (1.0, 0.5, 1.0)
    known = np.ones_like(gold)
    known[:50, 1] = False
    found = thresholds(scores, gold, known)

    def micro(least):
        named = (scores >= least) & known
        return 2 * (named & gold & known).sum() / (named.sum() + (gold & known).sum())

    assert micro(found) > micro((0.5, 0.5, 0.5)) + 0.05
    assert found[1] < found[0] - 0.1
    grid = np.linspace(0, 1, 101)
    assert micro(found) >= max(micro((a, b, found[2])) for a in grid for b in grid) - 0.02
    few = thresholds(scores[:8], gold[:8], known[:8])
    assert few == (0.5, 0.5, 0.5), "a few rows say nothing"
    assert thresholds(scores, np.zeros_like(gold), known) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("kind", TASKS)
def test_a_head_is_divided_and_answers_stay_in_order(bert: Encoder, kind: str):
    source = sets.source(kind)
    ready = prepare(TrainConfig.of(kind, max_length=32), bert, source)
    before, plain = run(ready.live, ready.items)[0], ready.live.task
    with settled(ready.live, ready.items, 64) as found:
        facts = found.facts["calibration"]
        torch.testing.assert_close(run(ready.live, ready.items)[0], before / facts["temperature"])
        assert facts["rows"] == len(source.records)
        assert 0 <= facts["ece"] <= 1
        delta = ready.live.freeze("mine")
        measured = evaluate(delta, source.records, bert).metrics
        assert {**found.metrics, "loss": 0} == pytest.approx({**measured, "loss": 0}, abs=1e-5)
        assert len(delta.task.thresholds) == (3 if kind == "multi-label" else 0)
    assert torch.equal(run(ready.live, ready.items)[0], before)
    assert ready.live.task == plain
    with settled(ready.live, ready.items, 64, calibrate=False) as found:
        assert torch.equal(run(ready.live, ready.items)[0], before)
    ready = prepare(TrainConfig.of("regression", max_length=32), bert, sets.source("regression"))
    with settled(ready.live, ready.items, 64) as found:
        assert found == Settled()
