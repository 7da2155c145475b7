"""Two processes on the CPU are one run: the same weights, metrics and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.training import processes
from bertology_serve.training.processes import ALONE, Processes, check_alone, join
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import prepare, train
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import NoCallback, Trainer, check_divisible
from tests.training import sets, two
from tests.training.live import trainer

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora,bitfit", "clip": 0.05},
    "full": {"method": "full", "checkpointing": True, "task": "token-classification"},
    "mixout": {"method": "mixout"},
    "child-d": {"method": "child-tuning", "options": {"child-tuning": {"mode": "d"}}},
    "child-f": {"method": "child-tuning", "options": {"child-tuning": {"mode": "f"}}},
    "one-row": {"method": "lora", "batch_size": 1},
}


def made(path: Path, values: Mapping[str, Any], among: Processes = ALONE) -> Trainer:
    """A trainer in float64, without dropout."""
    encoder = Encoder.load(str(path))
    encoder.model.double()
    given = {"task": "classification", "batch_size": 5, "max_length": 32, "max_steps": 4, **values}
    config = TrainConfig.of(**given, eval_every=2, keep="last", learning_rate=5e-3)
    ready = prepare(config, encoder, sets.source(config.task), sets.source(config.task, "dev.jsonl"))
    ready.live.to(encoder.dtype)
    for module in (*ready.live.modules(), *encoder.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return Trainer(ready.live, ready.task, ready.items, config, ready.dev, processes=among)


def test_two_processes_give_the_weights_of_one(bert_path: Path, monkeypatch: pytest.MonkeyPatch):
    def work(among: Processes) -> dict[str, Any]:
        found = {}
        for name, values in RUNS.items():
            one = made(bert_path, values, among)
            one.run()
            both = among.gathered([parameter.detach().clone() for parameter in one.parameters.values()])
            assert all(map(torch.equal, *both)), name
            found[name] = one
        return found

    found = two.run(work, monkeypatch)
    for name, values in RUNS.items():
        solo = made(bert_path, values)
        start = {key: parameter.detach().clone() for key, parameter in solo.parameters.items()}
        if name in ("mixout", "child-f"):  # draw as several processes do
            monkeypatch.setattr(solo, "processes", Seeded())
        solo.run()
        ours = found[name]
        assert ours.state.step == solo.state.step == 4
        assert ours.state.metrics == pytest.approx(solo.state.metrics, abs=1e-9), name
        for key, parameter in solo.parameters.items():
            assert parameter.dtype == torch.float64
            assert (ours.parameters[key] - parameter).abs().max() < 1e-9, (name, key)
        assert any(not torch.equal(p, start[key]) for key, p in solo.parameters.items())


class Seeded(Processes):
    """One process that draws as one of several."""

    def seed(self, run: int, step: int) -> None:
        """As if there were two."""
        Processes(0, 2).seed(run, step)


def test_a_whole_run_is_written_by_the_first_alone(bert_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = TrainConfig.of("classification", recipe="lp-ft", epochs=2, max_length=32, batch_size=5, save_every=2)
    data = sets.source("classification"), sets.source("classification", "dev.jsonl")
    steps: list[int] = []

    class Killer(NoCallback):
        def stepped(self, line: Any) -> None:
            steps.append(line["step"])
            if line["step"] == 5 and len(steps) == 5:
                raise KeyboardInterrupt

    def work(among: Processes) -> Any:
        for resume in (False, True):
            encoder, place = Encoder.load(str(bert_path)), Destination(tmp_path / "mood", resume=resume)
            try:
                outcome = train(config, encoder, *data, place=place, watcher=Killer(), ood=data[1], processes=among)
            except KeyboardInterrupt:
                among.wait()
        assert {result.delta.version for result in among.gathered(outcome)} == {outcome.delta.version}
        return outcome

    outcome = two.run(work, monkeypatch)
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".features", "mood"]
    assert outcome.delta.provenance["hardware"].startswith("2 processes, CPU")
    lines = (tmp_path / "mood" / "log.jsonl").read_text().splitlines()
    assert sum('"loss"' in line and '"stage": 2' in line and '"lr"' in line for line in lines) == 8
    assert {"accuracy", "ood_accuracy"} <= set(outcome.delta.metrics)


def test_the_parts_of_a_batch_are_all_of_it(bert: Encoder):
    items = trainer(bert).items
    parts = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(id(item) for part in parts for item in part) == sorted(map(id, items))
    tokens = [sum(item.tokens for item in part) for part in parts]
    assert max(tokens) < 1.3 * min(tokens)
    assert Processes(1, 2).share(items[:1]) == []
    assert ALONE.gathered(3) == [3]


def test_dropout_is_each_process_s_own_and_mixout_s_mask_is_not():
    def drawn(rank: int) -> tuple[float, float, float]:
        torch.manual_seed(rank)
        among = Processes(rank, 2)
        among.seed(0, 7)
        mask = float(torch.rand(()))
        with among.drawing(torch.device("cpu")):
            own = float(torch.rand(()))
            torch.rand(rank)
        return mask, own, float(torch.rand(()))

    first, second = drawn(0), drawn(1)
    assert (first[0], first[2]) == (second[0], second[2])
    assert len({*first, second[1]}) == 4


def test_what_cannot_be_divided_is_refused(bert: Encoder, monkeypatch: pytest.MonkeyPatch):
    task = trainer(bert, "embedding", method="lora").task
    check_divisible(task, ALONE)
    with pytest.raises(SpecError, match=r"embedding compares all pairs of a batch, which 2 processes cannot divide"):
        check_divisible(task, Processes(0, 2))
    assert join("cpu") == (ALONE, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpecError, match="take cuda: each gets a GPU of its own"):
        join("cuda:0")
    with pytest.raises(SpecError, match="train-fleet runs in one process, but 2 were started"):
        check_alone("train-fleet")
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"bertology-serve\[accelerate\]"):
        join("cpu")
