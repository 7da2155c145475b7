"""The search over methods: halving, its winner, its folds, and kills in the middle."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import bertology_serve as bs
from bertology_serve.data.records import Record
from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import DataError, SpecError
from bertology_serve.training import auto, trainer
from bertology_serve.training.auto import Search, candidates, folds, rungs, train_auto
from bertology_serve.training.batches import Data, Source
from bertology_serve.training.fleet import fleet
from bertology_serve.training.fleet.fleet_directory import Quiet
from bertology_serve.training.methods import specs_for
from bertology_serve.training.recipes import stages
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import Outcome, train
from bertology_serve.training.train_config import TrainConfig, read_budget
from tests.bits import same_bits
from tests.training import sets

# The probe of one C, the smallest, is a constant, which any training is better than; 14 rows, 4 steps an epoch.
BEATABLE: dict[str, Any] = {"lp_path": 1, "epochs": 10, "batch_size": 4, "max_length": 32, "head_learning_rate": 5e-3}


def rows() -> Source:
    """More of one label than of the other."""
    source = sets.source("classification")
    return Source(source.name, source.records[2:])


@pytest.fixture
def small_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small dev set is large enough."""
    monkeypatch.setattr(auto, "SMALL", 1)


def search(encoder: Encoder, out: Path, dev: Source | None = None, **values: Any) -> Outcome:
    place = Destination(out, resume=values.pop("resume", False))
    watcher = values.pop("watcher", None)
    config = TrainConfig.of("classification", "auto", **{"budget": "60", **BEATABLE, **values})
    return train_auto(config, encoder, rows(), dev, place=place, watcher=watcher)


def board(outcome: Outcome) -> dict[str, dict[str, str]]:
    with (outcome.path / "board.csv").open(newline="") as file:
        return {row["candidate"]: row for row in csv.DictReader(file)}


def test_rungs_leave_a_third():
    assert rungs(9, 2) == {4: 3, 8: 1, 12: 0}
    assert rungs(11) == {2: 3, 4: 1, 6: 0}
    assert rungs(2, 5) == {10: 1, 20: 0}
    assert rungs(1, 5) == {10: 0}


def test_a_budget_is_minutes_or_passes():
    assert read_budget("10m") == (600, True)
    assert read_budget("1.5h") == (5400, True)
    assert read_budget("40") == (40, False)
    assert TrainConfig.of("classification", "auto", budget=8).plan.budget == "8"  # type: ignore[arg-type]
    for wrong in ("ten", "0", "-3m", "5 d", ""):
        with pytest.raises(SpecError, match="expected minutes such as 10m, or a number of passes"):
            TrainConfig.of("classification", "auto", budget=wrong)


def test_candidates_are_those_that_suit(bert: Encoder):
    few = candidates(TrainConfig.of("classification", "auto"), bert, 100)
    many = candidates(TrainConfig.of("classification", "auto"), bert, 100_000)
    assert set(many) - set(few) == {"prefix"}
    assert {one.method[0] for one in few.values()} == {"lora", "bitfit", "adapter"}
    assert few["lora-wide"].options["lora"]["rank"] == 16
    given = candidates(TrainConfig.of("classification", "auto", learning_rate=0.5), bert, 100)
    assert {one.optim.learning_rate for one in given.values()} == {0.5}
    assert "lora" in given
    assert "lora-fast" not in given, "it would be the same"


def test_candidates_change_the_layers_that_are_named(bert: Encoder):
    found = candidates(TrainConfig.of("classification", "auto", layers="top:2"), bert, 100_000)
    specs = [spec for one in found.values() for spec in specs_for(one, bert.anatomy)]
    assert {spec.layers for spec in specs} == {(1, 2)}
    assert "prefix" not in found
    with pytest.raises(SpecError, match="layers is '9'; the encoder has 3 layers"):
        candidates(TrainConfig.of("classification", "auto", layers="9"), bert, 100)


def test_the_worse_end_early_and_the_winner_is_a_run_of_its_own(tmp_path: Path, bert: Encoder, small_dev: None):
    outcome = search(bert, tmp_path / "mine", rows())
    found, facts = board(outcome), outcome.delta.provenance["auto"]
    rung = facts["first_rung"]
    assert rung == 14, "10 epochs of 4 steps are six units of at most 7; 60 passes of 14 rows buy 26 units of 8"
    assert sorted(int(row["steps"]) for row in found.values()) == [0, *[rung] * 6, *[2 * rung] * 2, 3 * rung]
    (winner,) = (row for row in found.values() if row["end"] == "won")
    assert float(winner["accuracy"]) == max(float(row["accuracy"]) for row in found.values())
    assert float(winner["accuracy"]) == pytest.approx(outcome.delta.metrics["accuracy"])
    assert float(found["probe"]["accuracy"]) < float(winner["accuracy"])
    assert facts["why"].startswith(f"{winner['candidate']} has accuracy")
    assert [row["candidate"] for row in facts["board"]] == list(found)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    assert {"board.png", "config.toml", "log.jsonl"} <= {path.name for path in outcome.path.iterdir()}
    alone = train(
        TrainConfig.of(**outcome.delta.provenance["training"]),
        bert,
        rows(),
        rows(),
        place=Destination(tmp_path / "b"),
    )
    assert alone.delta.metrics == pytest.approx(outcome.delta.metrics, abs=1e-3)
    for name, tensor in {**alone.delta.tensors, **alone.delta.head}.items():
        assert torch.allclose(tensor, {**outcome.delta.tensors, **outcome.delta.head}[name], atol=1e-3), name


def test_where_nothing_is_better_the_probe_is_published(tmp_path: Path, bert: Encoder, small_dev: None):
    outcome = search(bert, tmp_path / "mine", rows(), lp_path=10, learning_rate=1e-6, head_learning_rate=1e-6)
    assert outcome.unimproved
    assert outcome.delta.kinds == ("probe",)
    assert outcome.delta.provenance["auto"]["why"].endswith(": no less")
    assert store.load(outcome.path).metrics == outcome.delta.metrics


@pytest.mark.parametrize("beaten", [False, True])
def test_without_a_dev_set_held_out_folds_judge(tmp_path: Path, bert: Encoder, beaten: bool):
    parts = folds(Data(rows()), 0)
    held = [{record.where for record in part.dev.records} for part in parts if part.dev]
    assert len(parts) == 3
    assert set.union(*held) == {record.where for record in rows().records}
    assert sum(map(len, held)) == len(rows().records)
    for part, own in zip(parts, held, strict=True):
        assert own.isdisjoint(record.where for record in part.train.records)
    more = {"lp_path": 10, "learning_rate": 1e-6, "head_learning_rate": 1e-6} if beaten else {}
    outcome = search(bert, tmp_path / "mine", budget="200", calibrate=False, **more)
    facts = outcome.delta.provenance["auto"]
    assert facts["folds"] == 3
    assert "on 3 held-out folds" in facts["why"]
    assert outcome.delta.metrics == {}
    assert outcome.delta.provenance["train"]["rows"] == len(rows().records), "trained on all in the end"
    assert outcome.unimproved is beaten
    assert (outcome.delta.kinds == ("probe",)) is beaten
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    if beaten:
        alone = TrainConfig.of("classification", recipe="lp", pooling="cls", **{**BEATABLE, "lp_path": 10})
        probe = train(alone, bert, rows(), place=Destination(tmp_path / "probe")).delta
        for name, tensor in probe.head.items():
            assert torch.allclose(outcome.delta.head[name], tensor, atol=1e-4), "solved, not random"


def test_bad_data_leaves_nothing_behind(tmp_path: Path, bert: Encoder):
    bad = Source("bad", [Record({"text": "a", "score": value}, f"bad:{value}") for value in (*range(7), "b")])
    config = TrainConfig.of("regression", method="auto", max_length=32, budget="4")
    with pytest.raises(DataError, match="bad:b"):
        train_auto(config, bert, bad, place=Destination(tmp_path / "mine"))
    assert list(tmp_path.iterdir()) == []


class Killed(Exception):
    pass


class Killer(Quiet):
    """Ends the process, as far as the search can tell, at the n-th of all steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def stepped(self, name: str, line: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


@same_bits
@pytest.mark.parametrize("steps", [5, 130, 170])
def test_killed_in_the_middle_it_has_the_same_winner(tmp_path: Path, bert_path: Path, small_dev: None, steps: int):
    straight = search(Encoder.load(str(bert_path)), tmp_path / "straight", rows(), save_every=2)
    with pytest.raises(Killed):
        search(Encoder.load(str(bert_path)), tmp_path / "killed", rows(), save_every=2, watcher=Killer(steps))
    torch.manual_seed(steps)  # whatever the process did before
    resumed = search(Encoder.load(str(bert_path)), tmp_path / "killed", rows(), save_every=2, resume=True)
    mine, theirs = board(straight), board(resumed)
    for row in (*mine.values(), *theirs.values()):
        del row["seconds"]
    assert mine == theirs
    for name, tensor in {**straight.delta.tensors, **straight.delta.head}.items():
        assert torch.equal(tensor, {**resumed.delta.tensors, **resumed.delta.head}[name]), name


def test_a_candidate_that_fails_is_left_behind(tmp_path: Path, bert: Encoder, small_dev: None, monkeypatch):
    ranked = Search.rank

    def never(self: Search, name: str) -> tuple[float, ...]:
        assert not any(member.failure for member in self.members(name))
        return ranked(self, name)

    monkeypatch.setattr(Search, "rank", never)
    monkeypatch.setitem(auto.CANDIDATES, "lora-fast", ("lora", 9.9, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertology_serve.training.methods.AdamW.step", _explodes)
        outcome = search(bert, tmp_path / "mine", rows())
    assert board(outcome)["lora-fast"]["end"].startswith("failed at step")


def _explodes(self: torch.optim.Optimizer, closure: Any = None) -> None:
    if self.param_groups[0]["initial_rate"] == 9.9:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))


def test_what_cannot_be_searched_is_refused(bert: Encoder, tmp_path: Path):
    with pytest.raises(SpecError, match="recipe lp-ft names what is trained, and method auto chooses it"):
        TrainConfig.of("classification", "auto", recipe="lp-ft")
    with pytest.raises(SpecError, match="method 'auto' stands alone"):
        TrainConfig.of("classification", "auto,lora")
    with pytest.raises(SpecError, match="method auto is a search by itself"):
        stages(TrainConfig.of("classification", "auto"))
    few = Source("few.jsonl", rows().records[:5])
    with pytest.raises(SpecError, match="3 folds of 5 training records are too few"):
        folds(Data(few), 0)


def test_from_python(tmp_path: Path, bert: Encoder):
    seen: list[Any] = []

    class Watch:
        def staged(self, *_: Any) -> None: ...
        def began(self, *_: Any) -> None: ...
        def stepped(self, line: Any) -> None:
            seen.append(line["candidate"])

        def evaluated(self, line: Any) -> None: ...

    data = [dict(record.fields) for record in sets.source("classification").records] * 4
    delta = bs.train(bert, data, method="auto", budget=1, batch_size=32, max_length=32, callbacks=[Watch()])
    assert delta.provenance["auto"]["budget"] == "1"
    assert {"lora-1", "bitfit-3"} <= set(seen)


def test_a_budget_in_minutes_ends_the_search(
    tmp_path: Path, bert: Encoder, small_dev: None, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the clock says: two minutes after the beginning there is no further step."""
    now = [0.0]
    monkeypatch.setattr(auto, "perf_counter", lambda: now[0])
    told: list[str] = []

    class Watch(Quiet):
        def stepped(self, name: str, line: Any) -> None:
            now[0] += 1.0

        def noted(self, text: str) -> None:
            told.append(text)

    monkeypatch.setattr(auto, "_seconds_a_row", lambda *_: 1.0)
    outcome = search(bert, tmp_path / "mine", rows(), budget="2m", watcher=Watch())
    found = board(outcome)
    steps = [int(row["steps"]) for row in found.values()]
    assert now[0] < 120 + len(steps), "one step of each at most is made when time is up"
    assert 0 < max(steps) < 3 * outcome.delta.provenance["auto"]["first_rung"] or max(steps) == 6
    assert len(told) == 1
    assert "the least that this search has to do takes about" in told[0]
    assert "--budget (2m) is over" in told[0]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("a_pass", "an_evaluation"), [(1.0, 30.0), (20.0, 1.0), (2.0, 2.0), (400.0, 1.0)])
def test_however_slow_the_machine_is_the_search_ends_in_time(
    tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch, held: bool, a_pass: float, an_evaluation: float
):
    """A pass and an evaluation take what they take; there is one of them too much at most."""
    now, ended = [0.0], [0.0]
    monkeypatch.setattr(auto, "perf_counter", lambda: now[0])
    monkeypatch.setattr(auto, "_seconds_a_row", lambda *_: 1e-6)  # the timing at the beginning was far off
    monkeypatch.setattr(auto, "SMALL", 1)

    def taking(module: Any, name: str, seconds: float) -> None:
        plain = getattr(module, name)

        def slow(*given: Any) -> Any:
            now[0] += seconds
            found = plain(*given)
            ended[0] = now[0]
            return found

        monkeypatch.setattr(module, name, slow)

    taking(fleet, "run_together", a_pass)
    taking(trainer, "measure", an_evaluation)
    outcome = search(bert, tmp_path / "mine", None if held else rows(), budget="2m", start="probe")
    assert ended[0] <= 1.1 * 120 + max(a_pass, an_evaluation)
    assert ended[0] > 60
    if not held and a_pass == 400.0:
        assert outcome.delta.kinds == ("probe",)


def test_time_that_is_up_before_a_first_step_is_said_where_there_is_no_probe(
    tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch
):
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(auto, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(auto, "_seconds_a_row", lambda *_: 1e-6)
    config = TrainConfig.of("classification", "auto", budget="1s", start="random", max_length=32)
    with pytest.raises(SpecError, match="time was up before the first step; give a larger --budget"):
        train_auto(config, bert, rows(), place=Destination(tmp_path / "mine"))


def test_time_that_is_up_at_once_leaves_the_probe(tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch):
    now = iter(range(0, 10**6, 100))
    monkeypatch.setattr(auto, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(auto, "_seconds_a_row", lambda *_: 1e-6)
    outcome = search(bert, tmp_path / "mine", budget="1s")
    assert outcome.delta.kinds == ("probe",)
    assert outcome.delta.provenance["auto"]["why"].endswith("no less")


@pytest.mark.parametrize("beaten", [False, True])
def test_folds_of_one_method_measure_and_calibrate_it(tmp_path: Path, bert: Encoder, beaten: bool):
    more = {"lp_path": 10, "learning_rate": 1e-6} if beaten else {"learning_rate": 2e-2}
    config = TrainConfig.of("classification", "lora", folds=4, **{**BEATABLE, **more})
    outcome = train_auto(config, bert, rows(), place=Destination(tmp_path / "mine"))
    facts = outcome.delta.provenance
    assert "auto" not in facts
    assert outcome.delta.kinds == (("probe",) if beaten else ("lora",))
    assert facts["train"]["rows"] == len(rows().records), "trained on all in the end"
    assert facts["folds"]["count"] == 4
    held = {record.where for part in folds(Data(rows()), 0, 4) if part.dev for record in part.dev.records}
    assert facts["calibration"]["rows"] == len(held) == len(rows().records)
    assert facts["calibration"]["ece"] <= facts["calibration"]["ece_before"]
    assert 0 <= facts["folds"]["mean"]["accuracy"] <= 1
    assert facts["folds"]["sd"].keys() == facts["folds"]["mean"].keys()
    assert outcome.delta.metrics == {}
    with pytest.raises(SpecError, match="folds take the place of --eval"):
        train_auto(config, bert, rows(), rows(), place=Destination(tmp_path / "other"))


def test_folds_and_budgets_that_mean_nothing_are_refused():
    with pytest.raises(SpecError, match="budget is what a search may take, and the method is lora; give --method auto"):
        TrainConfig.of("classification", budget="10m")
    with pytest.raises(SpecError, match="folds share one frozen encoder, but full trains its own"):
        TrainConfig.of("classification", "full", folds=5)
    with pytest.raises(SpecError, match="folds is 1; expected a number from 2"):
        TrainConfig.of("classification", folds=1)
