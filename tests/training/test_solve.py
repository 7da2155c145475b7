from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.deltas import store
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.forward_context import Pools
from bertology_serve.encoder.opening import open_delta
from bertology_serve.training import probe_solver
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.frozen_rows import pooled
from bertology_serve.training.probe_solver import Solver
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import Outcome, prepare, train
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import NoCallback
from tests.bits import same_bits
from tests.training import sets

DEFAULTS = {"recipe": "lp", "max_length": 32, "epochs": 2, "batch_size": 4, "calibrate": False}


def run(encoder: Encoder, out: Path, task: str = "classification", **values: Any) -> Outcome:
    place = {name: values.pop(name) for name in ("resume", "overwrite") if name in values}
    watcher, dev = values.pop("watcher", None), values.pop("dev", sets.source(task, "dev.jsonl"))
    config = TrainConfig.of(task, **{**DEFAULTS, **values})
    data = sets.source(task), dev
    return train(config, encoder, *data, place=Destination(out, **place), watcher=watcher)


def lines(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outcome.path / "log.jsonl").read_text().splitlines()]


def test_probe_is_published_at_the_optimum_for_its_c(tmp_path: Path, bert: Encoder):
    outcome = run(bert, tmp_path / "mine")
    delta, encoder = open_delta(tmp_path / "mine", None)
    assert delta.kinds == ("probe",)
    found = evaluate(delta, sets.source("classification").records, encoder).metrics
    assert {name: value for name, value in delta.metrics.items() if name != "loss"} == pytest.approx(found, abs=1e-5)
    tried = lines(outcome)
    assert [line["c"] for line in tried] == pytest.approx([10.0**exponent for exponent in range(-7, 3)])
    best = max(tried, key=lambda line: (line["eval"]["accuracy"], -line["eval"]["loss"]))
    assert outcome.state.best_step == best["step"]
    made = prepare(TrainConfig.of("classification", recipe="lp", max_length=32), bert, sets.source("classification"))
    x = pooled(made.live, made.items, (3,), 4096)[3].double()
    weight, bias = (delta.head[f"classifier.{name}"].double().requires_grad_(True) for name in ("weight", "bias"))
    penalty = (x.std(correction=0) * (weight[1] - weight[0])).square().sum() / (2 * best["c"] * len(x))
    loss = F.cross_entropy(x @ weight.T + bias, torch.tensor([item.target for item in made.items])) + penalty
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5 * max(1.0, float(x.std()))
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".features"}


def test_every_layer_has_a_probe_from_one_pass(tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch):
    passes: list[int] = []
    run_layers = Encoder.layers

    def counted(self: Encoder, batch: PackedBatch, pools: Pools) -> tuple[Tensor, ...]:
        passes.append(batch.sequences)
        return run_layers(self, batch, pools)

    monkeypatch.setattr(Encoder, "layers", counted)
    seen: list[int] = []

    class Watch(NoCallback):
        def evaluated(self, line: Any) -> None:
            seen.append(line["layer"])

    outcome = run(bert, tmp_path / "mine", lp_layers="all", lp_path=3, watcher=Watch())
    layers = json.loads((outcome.path / "layers.json").read_text())["layers"]
    assert [layer["layer"] for layer in layers] == seen == [0, 1, 2, 3]
    assert sum(passes) == 16, "the evaluation rows are the training rows, which were kept"
    assert layers[3]["accuracy"] == pytest.approx(outcome.delta.metrics["accuracy"])
    assert outcome.state.step == 12
    alone = run(bert, tmp_path / "alone", lp_path=3)
    for name, tensor in alone.delta.head.items():
        assert torch.allclose(tensor, outcome.delta.head[name], atol=1e-5)
    assert not (alone.path / "layers.json").exists()


def test_without_evaluation_data_cross_validation_chooses_c_by_the_loss(tmp_path: Path, bert: Encoder):
    outcome = run(bert, tmp_path / "mine", dev=None)
    assert outcome.delta.metrics == {}
    tried = lines(outcome)
    assert {16 * line["eval"]["accuracy"] % 1 for line in tried} == {0.0}, "every row is held out once"
    assert outcome.state.best_step == min(tried, key=lambda line: line["eval"]["loss"])["step"]
    made = prepare(TrainConfig.of("classification", recipe="lp", max_length=32), bert, sets.source("classification"))
    x = pooled(made.live, made.items, (3,), 4096)[3].double().numpy()
    y = np.array([item.target for item in made.items])
    drawn = torch.randperm(16, generator=torch.Generator().manual_seed(0)).numpy()
    order = drawn[np.argsort(y[drawn], kind="stable")]
    losses = []
    for out in (order[fold::5] for fold in range(5)):
        fit = np.setdiff1d(order, out)
        mean, std = x[fit].mean(), x[fit].std()
        theirs = LogisticRegression(C=tried[7]["c"], tol=1e-8, max_iter=1000).fit((x[fit] - mean) / std, y[fit])
        found = theirs.predict_proba((x[out] - mean) / std)
        losses += (-np.log(found[np.arange(len(out)), y[out]])).tolist()
    assert tried[7]["eval"]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)
    other = run(bert, tmp_path / "other", dev=None, seed=1)
    assert [line["eval"]["loss"] for line in lines(other)] != [line["eval"]["loss"] for line in tried]


def test_of_many_rows_one_part_is_held_out(tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_solver, "MANY", 16)
    outcome = run(bert, tmp_path / "mine", dev=None)
    assert {2 * line["eval"]["accuracy"] % 1 for line in lines(outcome)} == {0.0}, "two of sixteen rows"


def test_lp_ft_begins_with_the_solved_probe(tmp_path: Path, bert_path: Path):
    probe = run(Encoder.load(str(bert_path)), tmp_path / "probe").delta
    said: list[str] = []

    class Watch(NoCallback):
        def staged(self, stage: int, count: int, title: str) -> None:
            said.append(title)

    outcome = run(Encoder.load(str(bert_path)), tmp_path / "mine", recipe="lp-ft", learning_rate=1e-9, watcher=Watch())
    assert said == ["probe, solved", "full, with the head of the stage before"]
    for name, tensor in probe.head.items():
        assert torch.allclose(outcome.delta.head[name], tensor, atol=1e-6), "a rate of 1e-9 moves nothing to speak of"
    assert outcome.delta.kinds == ("full",)
    assert {line["stage"] for line in lines(outcome)} == {1, 2}


class Killed(Exception):
    pass


@same_bits
@pytest.mark.parametrize("recipe", ["lp", "lp-ft"])
def test_killed_in_the_path_it_ends_at_the_same_bits(
    tmp_path: Path, bert_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
):
    straight = run(Encoder.load(str(bert_path)), tmp_path / "straight", recipe=recipe)
    tried = Solver._tried

    def stops(self: Solver, layer: int, index: int, *rest: Any) -> Any:
        if index == 4:
            raise Killed
        return tried(self, layer, index, *rest)

    monkeypatch.setattr(Solver, "_tried", stops)
    with pytest.raises(Killed):
        run(Encoder.load(str(bert_path)), tmp_path / "killed", recipe=recipe)
    monkeypatch.undo()
    resumed = run(Encoder.load(str(bert_path)), tmp_path / "killed", recipe=recipe, resume=True)
    for group in ("head", "weights"):
        for name, tensor in getattr(straight.delta, group).items():
            assert torch.equal(getattr(resumed.delta, group)[name], tensor), name
    assert len(lines(resumed)) == len(lines(straight))
    assert store.load(resumed.path).metrics == store.load(straight.path).metrics


def test_regression_begins_at_ridge_and_is_never_worse(tmp_path: Path, bert: Encoder):
    probe = run(bert, tmp_path / "probe", "regression")
    found = evaluate(probe.delta, sets.source("regression").records, bert).metrics
    assert {name: value for name, value in probe.delta.metrics.items() if name != "loss"} == pytest.approx(found)
    best = max(line["eval"]["spearman"] for line in lines(probe))
    assert probe.delta.metrics["spearman"] == pytest.approx(best)
    assert best > 0.5
    still = run(bert, tmp_path / "still", "regression", recipe=None, pooling="mean", learning_rate=1e-9)
    assert still.unimproved
    assert still.delta.metrics == pytest.approx(probe.delta.metrics)
    moved = run(bert, tmp_path / "moved", "regression", recipe=None, pooling="mean", learning_rate=1e-2, epochs=8)
    assert moved.delta.metrics["spearman"] >= best
    assert moved.unimproved or moved.baselines["probe"] == pytest.approx(probe.delta.metrics)
    difference = 0.0 if moved.unimproved else moved.delta.metrics["spearman"] - best
    assert moved.delta.provenance.get("gain", {}).get("value", 0.0) == pytest.approx(difference, abs=1e-6)
