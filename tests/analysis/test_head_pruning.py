"""Neuron importance against finite differences; what is kept; the pruned encoder against the masked one, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.analysis import head_pruning as pruning
from bertology_serve.analysis.attention_heads import attention
from bertology_serve.analysis.head_importance import heads, kept, masked, neuron_importance, watched
from bertology_serve.analysis.head_pruning import prune
from bertology_serve.analysis.settings import HeadSettings, PruneSettings
from bertology_serve.analysis.subject_model import Gates, Subject, TaskEvaluation
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import SpecError, Unsupported, VerificationError
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.analysis.test_head_importance import CHOICE, CLASSES, TAGS, cross_entropy, made
from tests.training import sets


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v3"])
@pytest.mark.parametrize("task", [CLASSES, TAGS, CHOICE], ids=lambda task: task.kind)
def test_neuron_importance_equals_finite_differences(family: str, task: TaskSpec, tmp_path: Path) -> None:
    trial = made(family, tmp_path, task, 3)
    trial.subject.encoder.model.double()
    trial.subject.head.double()
    found = neuron_importance(trial)
    ones, step = torch.ones(3, 4, dtype=torch.float64), 1e-4
    for layer, neuron in ((0, 0), (1, 17), (2, 47)):
        expected = 0.0
        for item in trial.items:
            sides = []
            for sign in (1, -1):
                gate = torch.ones(48, dtype=torch.float64)
                gate[neuron] += sign * step
                with (
                    watched(trial.subject.encoder, lambda at, x, g=gate, there=layer: x * g if at == there else x),
                    torch.no_grad(),
                ):
                    sides.append(cross_entropy(trial, item, ones))
            expected += float(((sides[0] - sides[1]) / (2 * step)).abs()) / len(trial.items)
        assert float(found[layer][neuron]) == pytest.approx(expected, rel=2e-3, abs=1e-8)
    assert all((own > 0).any() for own in found)


def test_the_least_important_go_and_no_layer_loses_all() -> None:
    values = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 0.8, 0.95])]
    assert kept(values, 0.5) == ((2,), (0, 2))
    assert kept(values, 0.99) == ((2,), (2,))
    assert kept(values, 0.0) == ((0, 1, 2), (0, 1, 2))
    assert kept(values, 0.5, 2) == ((1, 2), (0, 2))
    assert kept(values, 0.5, 8) == ((0, 1, 2), (0, 1, 2))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_prune(family: str, tmp_path: Path) -> None:
    trial = made(family, tmp_path, CLASSES)
    before = trial.subject.encoder.ref.sha256
    settings = PruneSettings(heads=0.5, neurons=0.4, rounds=1)
    report = prune(trial.subject, trial.name, tmp_path / "small", settings)
    facts = report.facts
    assert facts["heads"] == [12, 6]
    assert facts["neurons"][0] == 144
    assert 80 <= facts["neurons"][1] <= 112
    assert facts["largest_difference"] < 1e-5 < facts["largest_output"]
    assert facts["parameters"][1] < facts["parameters"][0]
    small = Encoder.load(str(tmp_path / "small"))
    assert facts["pruned_sha256"] == small.ref.sha256 != before
    assert [row["heads"] for row in report.tables["layers"]] == [small.anatomy.heads_of(layer) for layer in range(3)]
    assert trial.subject.encoder.ref.sha256 == before
    gates = torch.zeros(3, 4)
    for row in report.tables["layers"]:
        gates[row["layer"], list(map(int, row["heads_that_stayed"].split()))] = 1
    assert small.pruning is not None
    with masked(trial.subject.encoder, small.pruning.neurons), torch.inference_mode():
        expected = trial.output(trial.pack(trial.items), Gates(gates))
    on_small = TaskEvaluation(Subject(small, trial.subject.delta).checked(), trial.name, None, 10_000)
    with torch.inference_mode():
        found = on_small.output(on_small.pack(on_small.items))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pruned_encoder_is_analysed_and_pruned_again(tmp_path: Path) -> None:
    trial = made("bert", tmp_path, CLASSES)
    prune(trial.subject, trial.name, tmp_path / "small", PruneSettings(heads=0.4, rounds=1))
    small = Subject.of(str(tmp_path / "small"), trial.subject.delta)
    seven = heads(small, trial.name, HeadSettings(steps=2, seeds=1, leave_one_out=True))
    assert len(seven.tables["importance"]) == 7
    assert sorted(row["goes"] for row in seven.tables["importance"]) == list(range(1, 8))
    values = seven.figures["importance"].panels[0].values
    assert sum(value is None for row in values for value in row) == 5
    assert len(attention(small, ["the cat was great"]).tables["heads"]) == 7
    again = prune(small, trial.name, tmp_path / "smaller", PruneSettings(heads=0.5, rounds=1))
    assert again.facts["heads"] == [7, 3]
    assert Encoder.load(str(tmp_path / "smaller")).pruning.before.parent == trial.subject.encoder.ref


def test_a_whole_model_is_pruned_through_its_base(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "base")
    live = TrainableDelta(encoder, [], CLASSES, full=True)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.1)
    delta = live.freeze("full", "1")
    rows = sets.write(tmp_path / "rows.jsonl", sets.classification())
    report = prune(None, rows, tmp_path / "small", PruneSettings(rounds=1), delta=delta)
    assert report.facts["largest_difference"] < 1e-5 * report.facts["largest_output"]
    assert Encoder.load(str(tmp_path / "small")).pruning.parent == encoder.ref
    assert Encoder.for_delta(delta, str(tmp_path / "small")).ref.sha256 == report.facts["pruned_sha256"]


def test_what_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = made("bert", tmp_path, CLASSES)
    with pytest.raises(SpecError, match="exists already"):
        prune(trial.subject, trial.name, tmp_path)
    with pytest.raises(SpecError, match="share from 0"):
        PruneSettings(heads=1.0)
    with pytest.raises(SpecError, match="give the delta"):
        prune(Subject(trial.subject.encoder), trial.name, tmp_path / "small")
    other = made("mpnet", tmp_path / "mpnet", CLASSES)
    with pytest.raises(Unsupported, match="mpnet counts on the same heads"):
        prune(other.subject, other.name, tmp_path / "small")
    monkeypatch.setattr(pruning, "masked", lambda encoder, _: masked(encoder, [range(9)] * 3))
    with pytest.raises(VerificationError, match="nothing was written"):
        prune(trial.subject, trial.name, tmp_path / "small", PruneSettings(rounds=1))
    assert not (tmp_path / "small").exists()


def test_a_pruned_encoder_that_gives_no_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, real = made("bert", tmp_path, CLASSES), TaskEvaluation.output

    def output(self: TaskEvaluation, *args: Any) -> torch.Tensor:
        return real(self, *args) * (1.0 if self.subject.encoder is trial.subject.encoder else float("nan"))

    monkeypatch.setattr(TaskEvaluation, "output", output)
    with pytest.raises(VerificationError, match=r"by nan; .* nothing was written"):
        prune(trial.subject, trial.name, tmp_path / "small", PruneSettings(rounds=1))
    assert not (tmp_path / "small").exists()


def test_a_delta_trained_on_a_pruned_encoder_is_judged_there(tmp_path: Path) -> None:
    trial = made("bert", tmp_path, CLASSES)
    prune(trial.subject, trial.name, tmp_path / "small", PruneSettings(heads=0.5, neurons=0.5, rounds=1))
    small = Encoder.load(str(tmp_path / "small"))
    own = tiny.delta(small, "again", [Lora(("query", "up", "down"), rank=2)], CLASSES)
    assert 0 <= TaskEvaluation(Subject(small, own).checked(), trial.name, None, 64).measure()["accuracy"] <= 1
