"""The life of a fleet: data to directories, failures, kills and their continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import InputError, SpecError
from bertology_serve.training.batches import Source
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.fleet.fleet import Member
from bertology_serve.training.fleet.fleet_directory import Quiet
from bertology_serve.training.fleet.fleet_run import train_fleet
from bertology_serve.training.fleet.fleet_spec import FleetSpec, fleet_from_dict
from bertology_serve.training.frozen_rows import pooled
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import train
from bertology_serve.training.train_config import TrainConfig
from tests.bits import same_bits
from tests.training import sets


def fleet(root: Path, **more: Any) -> FleetSpec:
    """Three deltas of two tasks; one has dropout inside the encoder, one begins at the probe."""
    for task in ("classification", "regression"):
        sets.write(root / f"{task}.jsonl", sets.SETS[task]())
    shared = {"task": "classification", "train": "classification.jsonl", "eval": "classification.jsonl"}
    shared |= {"batch_size": 5, "max_length": 32, "learning_rate": 5e-3, "epochs": 3, "start": "random"}
    deltas: dict[str, dict[str, Any]] = {
        "mood": {"method": "lora", "dropout": 0.2, "ood": "classification.jsonl"},
        "score": {"task": "regression", "train": "regression.jsonl", "eval": "regression.jsonl", "method": "adapter"},
        "tone": {"method": "bitfit", "epochs": 1, "seed": 4, "start": "probe"},
    }
    for name, own in more.pop("deltas", {}).items():
        deltas[name] = {**deltas[name], **own}
    return fleet_from_dict({"all": shared, "delta": deltas, "save_every": 2, **more}, root)


class Killed(Exception):
    pass


class Killer(Quiet):
    """Ends the process, as far as the fleet can tell, at a step of a member or after it was published."""

    def __init__(self, name: str, step: int) -> None:
        self.name, self.step = name, step

    def stepped(self, name: str, line: Any) -> None:
        if (name, line["step"]) == (self.name, self.step):
            raise Killed

    def published(self, name: str, difference: float) -> None:
        if (name, 0) == (self.name, self.step):
            raise Killed


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in found]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, bert_path: Path) -> tuple[Any, dict[str, Any]]:
    """The deltas of a fleet that nothing happened to, and their logs."""
    root = tmp_path_factory.mktemp("straight")
    deltas = train_fleet(fleet(root), Encoder.load(str(bert_path)), root / "out")
    assert sorted(path.name for path in (root / "out").iterdir()) == ["mood", "score", "tone"]
    return deltas, {one: lines(root / "out" / one) for one in deltas}


@same_bits
@pytest.mark.parametrize(("name", "step"), [("score", 1), ("mood", 6), ("tone", 0), ("mood", 8)])
def test_a_killed_fleet_ends_as_if_nothing_had_happened(tmp_path, bert_path, straight, name, step):
    out, spec = tmp_path / "out", fleet(tmp_path)
    with pytest.raises(Killed):
        train_fleet(spec, Encoder.load(str(bert_path)), out, watcher=Killer(name, step))
    assert (out / ".fleet").exists()
    torch.manual_seed(step)  # whatever the process did before
    (out / ".mood.123.tmp" / "delta").mkdir(parents=True)  # a kill while publishing leaves this
    resumed = train_fleet(spec, Encoder.load(str(bert_path)), out, resume=True)
    assert sorted(path.name for path in out.iterdir()) == ["mood", "score", "tone"]
    deltas, logs = straight
    assert {one: lines(out / one) for one in resumed} == logs
    for one, delta in deltas.items():
        theirs = {**resumed[one].tensors, **resumed[one].head}
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in {**delta.tensors, **delta.head}.items()), one
        assert delta.metrics == resumed[one].metrics


def test_published_deltas_answer(tmp_path, bert: Encoder):
    train_fleet(fleet(tmp_path), bert, tmp_path / "out")
    mood = store.load(tmp_path / "out" / "mood")
    found = evaluate(mood, sets.source("classification").records, bert).metrics
    assert found["accuracy"] == pytest.approx(mood.metrics["accuracy"])
    assert mood.metrics["ood_accuracy"] == pytest.approx(mood.metrics["accuracy"])
    assert mood.provenance["training"]["options"] == {"lora": {"dropout": 0.2}}


def test_a_member_that_fails_is_named_when_the_others_are_there(tmp_path, bert: Encoder, monkeypatch):
    class Sick(Member):
        def begin(self, found: Any) -> None:
            super().begin(found)
            if self.name == "tone":
                with torch.no_grad():
                    list(self.parameters.values())[-1].fill_(float("inf"))

    monkeypatch.setattr("bertology_serve.training.fleet.fleet_run.Member", Sick)
    out = tmp_path / "out"
    with pytest.raises(SpecError, match="tone failed at step 1: the loss is nan"):
        train_fleet(fleet(tmp_path), bert, out)
    assert sorted(path.name for path in out.iterdir()) == ["mood", "score"]


@pytest.mark.parametrize("epochs", [1, 20])
def test_members_begin_and_end_as_runs_alone(tmp_path, bert: Encoder, epochs: int):
    rows = sets.classification()[2:]  # more of one label than of the other
    sets.write(tmp_path / "rows.jsonl", rows)
    own = {"task": "classification", "epochs": epochs, "batch_size": 6, "start": "probe"}
    # with one C, the smallest, the probe is a constant, which any training is better than
    own |= {"learning_rate": 1e-6} if epochs == 1 else {"learning_rate": 1e-2, "lp_path": 1}
    shared = {**own, "train": "rows.jsonl", "eval": "rows.jsonl"}
    spec = fleet_from_dict({"all": shared, "delta": {"a": {"method": "lora"}, "b": {"method": "bitfit"}}}, tmp_path)
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        name = "bertology_serve.training.frozen_rows.pooled"
        patch.setattr(name, lambda live, items, *more: (taken.append(len(items)), pooled(live, items, *more))[1])
        together = train_fleet(spec, bert, tmp_path / "out")
    assert taken == [len(rows)], "features are taken once; the dev rows are the training rows"
    for method, name in (("lora", "a"), ("bitfit", "b")):
        source, place = Source.read(rows), Destination(tmp_path / f"alone-{name}")
        alone = train(TrainConfig.of(method=(method,), **own), bert, source, source, place=place)
        assert together[name].kinds == alone.delta.kinds == (("probe",) if epochs == 1 else (method,))
        assert alone.unimproved is (epochs == 1)
        assert together[name].provenance["baselines"] == alone.baselines
        assert together[name].provenance.get("gain") == alone.delta.provenance.get("gain")
        if not alone.unimproved:  # better in the metric, or where that is the same in the loss
            start = alone.baselines["probe"]
            assert (together[name].metrics["accuracy"], -together[name].metrics["loss"]) > (
                start["accuracy"],
                -start["loss"],
            )
        assert together[name].metrics == pytest.approx(alone.delta.metrics, abs=1e-3)
        for key, tensor in alone.delta.head.items():
            assert torch.allclose(together[name].head[key], tensor, atol=1e-3), key
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_what_is_in_the_way_stays(tmp_path, bert: Encoder):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train_fleet(fleet(tmp_path), bert, out, watcher=Killer("mood", 3))
    with pytest.raises(InputError, match=r"an unfinished fleet lies in .*continue it with --resume"):
        train_fleet(fleet(tmp_path), bert, out)
    with pytest.raises(InputError, match=r"tone\.seed was 4 and is now 5"):
        train_fleet(fleet(tmp_path, deltas={"tone": {"seed": 5}}), bert, out, resume=True)
    train_fleet(fleet(tmp_path), bert, out, overwrite=True)
    with pytest.raises(InputError, match=r"mood exists; choose another --out"):
        train_fleet(fleet(tmp_path), bert, out)


def test_full_fine_tuning_is_refused_before_it_begins(tmp_path, bert: Encoder):
    spec = fleet(tmp_path, deltas={"tone": {"method": "full"}})
    with pytest.raises(SpecError, match="tone: a fleet shares one frozen encoder"):
        train_fleet(spec, bert, tmp_path / "out")
