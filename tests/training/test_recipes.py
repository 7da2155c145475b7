from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.opening import open_delta
from bertology_serve.errors import InputError, SpecError
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.recipes import stages
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import Outcome, train
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import NoCallback, Trainer
from tests.bits import same_bits
from tests.training import sets

QUICK = {"epochs": 2, "batch_size": 4, "save_every": 1, "max_length": 32}


def run(encoder: Encoder, out: Path, recipe: str, task: str = "classification", **values: Any) -> Outcome:
    place = {name: values.pop(name) for name in ("version", "resume", "overwrite") if name in values}
    watcher = values.pop("watcher", None)
    config = TrainConfig.of(task, recipe=recipe, **{**QUICK, "max_length": sets.LENGTHS.get(task, 32), **values})
    dev = sets.source(task, "dev.jsonl")
    return train(config, encoder, sets.source(task), dev, place=Destination(out, **place), watcher=watcher)


def tensors(outcome: Outcome) -> dict[str, Tensor]:
    return {**outcome.delta.tensors, **outcome.delta.head, **outcome.delta.weights}


def test_stages_say_what_is_trained_and_from_what_start():
    probe, full = stages(TrainConfig.of("classification", recipe="lp-ft", epochs=5, first_epochs=2, learning_rate=1e-5))
    assert not probe.solved, "epochs were given for it"
    assert [stage.solved for stage in stages(TrainConfig.of("classification", recipe="lp-ft"))] == [True, False]
    assert [stage.solved for stage in stages(TrainConfig.of("multiple-choice", recipe="lp-ft"))] == [False, False]
    assert [stage.solved for stage in stages(TrainConfig.of("regression"))] == [True, False]
    assert [stage.solved for stage in stages(TrainConfig.of("classification", recipe="lp"))] == [True]
    assert (probe.config.method, probe.config.optim.epochs, probe.config.optim.learning_rate) == (("probe",), 2, None)
    assert (full.config.method, full.config.optim.epochs, full.config.head_rate) == (("full",), 5, 1e-5)
    assert (probe.given_head, full.given_head, probe.kept, full.kept) == (False, True, "", "")
    assert {(s.config.known_task.pooling, s.config.known_task.head) for s in (probe, full)} == {("mean", "linear")}
    options = {"lora": {"rank": 2}}
    delta, full = stages(TrainConfig.of("regression", "lora,bitfit", recipe="eh-ft", options=options))
    assert (delta.config.method, delta.config.options, delta.kept) == (("lora", "bitfit"), options, "lora-bitfit")
    assert (full.config.method, full.config.options, full.given_head) == (("full",), {}, True)
    assert {(s.config.known_task.pooling, s.config.known_task.head) for s in (delta, full)} == {("cls", "hf")}
    assert all(stage.config.plan.recipe is None for stage in (delta, full))
    mixed = stages(TrainConfig.of("regression", "mixout", recipe="lp-ft", options={"mixout": {"p": 0.9}}))[1]
    assert mixed.config.options == {"mixout": {"p": 0.9}}
    config = TrainConfig.of("regression", start="random")
    assert [stage.config for stage in stages(config)] == [config]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "lpft"}, "unknown recipe 'lpft'; did you mean 'lp-ft'"),
        ({"recipe": "eh-ft", "method": "full"}, "recipe eh-ft begins with a delta, but the method is full"),
        ({"recipe": "lp-ft", "method": "probe"}, "recipe lp-ft begins with the probe"),
        ({"first_epochs": 2}, "those of a recipe's first stage; give --recipe lp-ft or eh-ft too"),
        (
            {"recipe": "lp", "method": "lora"},
            "recipe lp solves a probe for .*; got method lora",
        ),
        (
            {"recipe": "lp", "task": "embedding"},
            "recipe lp solves a probe for .*; .* embedding",
        ),
        ({"recipe": "lp", "head": "hf"}, "recipe lp solves one linear layer; got head 'hf'"),
        ({"recipe": "lp", "lp_path": 0}, "lp_path is 0"),
        ({"recipe": "lp", "lp_layers": "some"}, "unknown lp_layers 'some'"),
        ({"recipe": "eh-ft", "first_epochs": 0}, "first_epochs is 0"),
        ({"recipe": "eh-ft", "first_learning_rate": -1.0}, "first_learning_rate is -1.0"),
    ],
)
def test_senseless_recipes_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        TrainConfig.of(**{"task": "classification", **values})


def test_imports_no_torch():
    code = "import sys; from bertology_serve.training import recipes; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


class Starts(NoCallback):
    """Remembers what was said, and the weights before each stage's first step."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, str]] = []

    def staged(self, stage: int, count: int, title: str) -> None:
        self.said.append((stage, count, title))


@pytest.mark.parametrize(("recipe", "kind"), [("lp-ft", "probe"), ("eh-ft", "lora")])
def test_last_stage_begins_at_the_pretrained_weights_with_the_head(
    tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch, recipe: str, kind: str
):
    pretrained = {name: tensor.clone() for name, tensor in bert.model.state_dict().items()}
    starts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    begin = Trainer._begin

    def spied(self: Trainer) -> None:
        begin(self)
        weights = {name: tensor.clone() for name, tensor in self.live.encoder.model.state_dict().items()}
        starts.append((weights, self.live.head.own_tensors()))

    monkeypatch.setattr(Trainer, "_begin", spied)
    watcher = Starts()
    outcome = run(bert, tmp_path / "mine", recipe, watcher=watcher, learning_rate=1e-3, first_epochs=2)
    ends = [kind, "full"]
    assert [(stage, count) for stage, count, _ in watcher.said] == [(1, 2), (2, 2)]
    assert [title.split(",")[0] for _, _, title in watcher.said] == ends
    weights, head = starts[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in pretrained.items())
    if recipe == "eh-ft":
        first = store.load(tmp_path / "mine-lora")
        assert all(torch.equal(head[name], tensor) for name, tensor in first.head.items())
    assert not all(torch.equal(head[name], starts[0][1][name]) for name in starts[0][1]), "the head has learnt"
    assert outcome.delta.kinds == ("full",)
    assert outcome.difference < 1e-5


def test_products_are_ordinary_deltas(tmp_path: Path, bert: Encoder):
    outcome = run(bert, tmp_path / "mine", "eh-ft", method="bitfit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine-bitfit"]
    for name, kinds in (("mine", ("full",)), ("mine-bitfit", ("bitfit",))):
        delta, encoder = open_delta(tmp_path / name, None)
        assert (delta.name, delta.kinds) == (name, kinds)
        found = evaluate(delta, sets.source("classification").records, encoder).metrics
        assert {key: value for key, value in delta.metrics.items() if key != "loss"} == pytest.approx(found, abs=1e-5)
    facts = store.load(tmp_path / "mine").provenance
    assert TrainConfig.of(**facts["training"]).plan.recipe == "eh-ft"
    assert facts["seconds"] >= store.load(tmp_path / "mine-bitfit").provenance["seconds"]
    lines = [json.loads(line) for line in (outcome.path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines if "loss" in line] == [
        (stage, step) for stage in (1, 2) for step in range(1, 9)
    ]


def test_the_first_stage_is_the_solo_run(tmp_path: Path, bert_path: Path):
    """The kept delta is what ``--method lora`` alone would have given."""
    run(Encoder.load(str(bert_path)), tmp_path / "both", "eh-ft", version="1", calibrate=False)
    config = stages(TrainConfig.of("classification", recipe="eh-ft", calibrate=False, **QUICK))[0].config
    data = sets.source("classification"), sets.source("classification", "dev.jsonl")
    solo = train(config, Encoder.load(str(bert_path)), *data, place=Destination(tmp_path / "solo")).delta
    kept = store.load(tmp_path / "both-lora" / "1")
    assert (kept.name, kept.version) == ("both-lora", "1")
    for name, tensor in {**solo.tensors, **solo.head}.items():
        assert torch.equal(tensor, {**kept.tensors, **kept.head}[name])


@pytest.mark.parametrize("task", ["regression", "token-classification", "question-answering", "multiple-choice"])
def test_every_task_with_a_head_takes_both(tmp_path: Path, bert_path: Path, task: str):
    for recipe in ("lp-ft", "eh-ft"):
        outcome = run(Encoder.load(str(bert_path)), tmp_path / recipe, recipe, task, epochs=1)
        assert outcome.delta.kinds == ("full",)


class Killed(Exception):
    pass


class Killer(NoCallback):
    """Stops a run in a stage, after a step."""

    def __init__(self, stage: int, step: int) -> None:
        self.at = (stage, step)

    def stepped(self, line: Any) -> None:
        if (line["stage"], line["step"]) == self.at:
            raise Killed


@same_bits
@pytest.mark.parametrize("recipe", ["lp-ft", "eh-ft"])
@pytest.mark.parametrize("at", [(1, 3), (1, 8), (2, 1), (2, 5)], ids=str)
def test_killed_in_any_stage_it_ends_at_the_same_bits(tmp_path: Path, bert_path: Path, recipe: str, at: Any):
    values = {"save_every": 2, "trunk_dropout": True, "first_epochs": 2}
    straight = run(Encoder.load(str(bert_path)), tmp_path / "straight", recipe, **values)
    with pytest.raises(Killed):
        run(Encoder.load(str(bert_path)), tmp_path / "killed", recipe, watcher=Killer(*at), **values)
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "killed-lora").exists() == (recipe == "eh-ft" and at[0] == 2)
    torch.manual_seed(sum(at))  # whatever the process did before
    watcher = Starts()
    resumed = run(Encoder.load(str(bert_path)), tmp_path / "killed", recipe, resume=True, watcher=watcher, **values)
    assert [stage for stage, _, _ in watcher.said] == list(range(at[0], 3)), "a finished stage is not made again"
    assert all(torch.equal(tensors(resumed)[name], tensor) for name, tensor in tensors(straight).items())
    logs = [
        [json.loads(line) for line in (one.path / "log.jsonl").read_text().splitlines()] for one in (straight, resumed)
    ]
    for lines in logs:
        for line in lines:
            line.pop("tokens_per_s", None)
    assert logs[0] == logs[1]


@same_bits
def test_a_kill_between_stages_continues_with_the_next(tmp_path: Path, bert_path: Path, monkeypatch: Any):
    """The first stage's delta stands, the second has no checkpoint; the one that lies there is the first's."""
    straight = run(Encoder.load(str(bert_path)), tmp_path / "straight", "eh-ft")
    begin = Trainer._begin

    def stops(self: Trainer) -> None:
        if self.state.stage == 2:
            raise Killed
        begin(self)

    monkeypatch.setattr(Trainer, "_begin", stops)
    with pytest.raises(Killed):
        run(Encoder.load(str(bert_path)), tmp_path / "killed", "eh-ft")
    monkeypatch.undo()
    resumed = run(Encoder.load(str(bert_path)), tmp_path / "killed", "eh-ft", resume=True)
    assert all(torch.equal(tensors(resumed)[name], tensor) for name, tensor in tensors(straight).items())


def test_what_stands_in_the_product_s_place_is_not_overwritten(tmp_path: Path, bert: Encoder):
    run(bert, tmp_path / "mine", "eh-ft", epochs=1)
    (tmp_path / "mine").rename(tmp_path / "other-lora")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"other-lora exists; choose another --out, or replace it"):
            run(Encoder.load(bert.name), tmp_path / "other", "eh-ft", epochs=1, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine-lora", "other-lora"]


def test_the_head_may_be_the_authors_mlp(tmp_path: Path, bert: Encoder):
    """Its logits survive the way to disk and back, or nothing would be published."""
    outcome = run(bert, tmp_path / "x", "eh-ft", method="bitfit", head="mlp", epochs=1)
    assert outcome.delta.head["classifier.dense.weight"].shape[0] == 2048
    assert not TrainConfig.of("classification", recipe="lp-ft", head="mlp").solvable
    assert [stage.solved for stage in stages(TrainConfig.of("classification", recipe="lp-ft", head="mlp"))] == [
        False
    ] * 2
