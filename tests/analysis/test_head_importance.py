"""Importance against finite differences in float64; masking against zeroed output columns; the curve's ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bertology_serve.analysis.head_importance import (
    IMPORTANCE,
    LEFT_OUT,
    RANDOM,
    _within,
    heads,
    importance,
    normalised,
)
from bertology_serve.analysis.settings import HeadSettings
from bertology_serve.analysis.subject_model import Gates, Subject, TaskEvaluation
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.training import sets

CLASSES = TaskSpec("classification", ("down", "up"), max_length=32)
TAGS = TaskSpec("token-classification", ("O", "B-WHO", "B-PLACE"), max_length=32)
CHOICE = TaskSpec("multiple-choice", max_length=32)


def made(family: str, folder: Path, task: TaskSpec, rows: int | None = None) -> TaskEvaluation:
    encoder = tiny.encoder(family, folder)
    delta = tiny.delta(encoder, "d", [Lora(rank=2)], task, size=0.3)
    return TaskEvaluation(Subject(encoder, delta), sets.write(folder / "rows.jsonl", sets.SETS[task.kind]()), rows, 64)


def cross_entropy(trial: TaskEvaluation, item: object, gates: torch.Tensor) -> torch.Tensor:
    """One example's loss in float64, written out here."""
    out = trial.output(trial.pack([item]), Gates(gates)).double()
    if trial.task.kind == "multiple-choice":
        return F.cross_entropy(out.view(1, -1), torch.tensor([item.target[0]]))
    target = torch.tensor(item.target) if trial.task.spec.per_token else torch.tensor([item.target])
    return F.cross_entropy(out, target, reduction="sum")


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "mpnet", "deberta-v3"])
@pytest.mark.parametrize("task", [CLASSES, TAGS, CHOICE], ids=lambda task: task.kind)
def test_importance_equals_finite_differences(family: str, task: TaskSpec, tmp_path: Path) -> None:
    trial = made(family, tmp_path, task, 3)
    trial.subject.encoder.model.double()
    trial.subject.head.double()
    found = importance(trial)
    coarse = family == "modernbert"  # transformers rotates in float32, which a small step would only measure
    step, ones = 5e-3 if coarse else 1e-4, torch.ones(3, 4, dtype=torch.float64)
    expected = torch.zeros_like(ones)
    with torch.no_grad():
        for item in trial.items:
            for layer, head in ((0, 0), (1, 2), (2, 3)):
                sides = []
                for sign in (1, -1):
                    gates = ones.clone()
                    gates[layer, head] += sign * step
                    sides.append(cross_entropy(trial, item, gates))
                expected[layer, head] += ((sides[0] - sides[1]) / (2 * step)).abs() / len(trial.items)
    chosen = expected > 0
    assert chosen.sum() == 3
    torch.testing.assert_close(
        found[chosen], expected[chosen], rtol=2e-3 if coarse else 1e-5, atol=2e-5 if coarse else 1e-9
    )


def test_a_masked_head_is_one_whose_output_columns_are_zero(tmp_path: Path) -> None:
    trial = made("bert", tmp_path, CLASSES)
    gates = torch.ones(3, 4)
    gates[1, 2] = gates[2, 0] = 0
    batch = trial.pack(trial.items)
    with torch.inference_mode():
        masked = trial.output(batch, Gates(gates))
        untouched = trial.output(batch)
        for layer, head in ((1, 2), (2, 0)):
            trial.subject.encoder.model.encoder.layer[layer].attention.output.dense.weight[
                :, head * 8 : head * 8 + 8
            ] = 0
        expected = trial.output(batch)
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)
    assert (masked - untouched).abs().max() > 1e-3


def test_open_gates_change_nothing(tmp_path: Path) -> None:
    trial = made("bert", tmp_path, TAGS)
    assert trial.measure(torch.ones(3, 4)) == pytest.approx(trial.measure(), rel=1e-5)


def test_report(tmp_path: Path) -> None:
    trial = made("bert", tmp_path, CLASSES)
    seen = []
    report = heads(
        trial.subject, trial.name, HeadSettings(steps=4, seeds=2, leave_one_out=True),
        advance=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    curve = report.tables["curve"]
    assert {row["order"] for row in curve} == {IMPORTANCE, LEFT_OUT, RANDOM}
    assert len(curve) == 4 * 5
    starts = {row["accuracy"] for row in curve if row["share"] == 0}
    assert starts == {trial.measure()["accuracy"]} == {report.facts["unmasked"]}
    assert {row["accuracy"] for row in curve if row["share"] == 1} == {trial.measure(torch.zeros(3, 4))["accuracy"]}
    table = report.tables["importance"]
    raw = torch.tensor([row["importance"] for row in table], dtype=torch.float64).view(3, 4)
    torch.testing.assert_close(raw, importance(trial))
    assert normalised(raw).norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    first = min(table, key=lambda row: row["goes"])
    assert first["normalised"] == min(row["normalised"] for row in table)
    gates = torch.ones(3, 4)
    gates[first["layer"], first["head"]] = 0
    assert first["loss_rise"] == pytest.approx(trial.measure(gates)["loss"] - trial.measure()["loss"], abs=1e-6)
    assert seen[-1] == (20, 20)
    report.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "heads.json").read_text())["tables"]["curve"] == curve
    assert (tmp_path / "out" / "heads-curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("curve", "share"),
    [([0.9, 0.9, 0.895, 0.7], 2 / 3), ([0.9, 0.8, 0.9, 0.9], 0.0), ([0.9, 0.91, 0.89, 0.9], 1.0)],
)
def test_share_within_a_point_ends_at_the_first_fall(curve: list[float], share: float) -> None:
    assert _within([curve], [0, 1 / 3, 2 / 3, 1], 0.01) == share


def test_what_cannot_be_judged(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    with pytest.raises(SpecError, match="--delta"):
        heads(encoder, "rows.jsonl")
    task = TaskSpec("embedding", max_length=32, pooling="mean", head="none")
    delta = tiny.delta(encoder, "d", [Lora(rank=2)], task)
    with pytest.raises(Unsupported, match="its loss compares examples with each other"):
        heads(Subject(encoder, delta), "rows.jsonl")
    with pytest.raises(SpecError, match="seeds is -1"):
        HeadSettings(seeds=-1)
