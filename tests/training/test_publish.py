from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import FormatError, VerificationError
from bertology_serve.training import publish as publishing
from bertology_serve.training.publish import publish
from bertology_serve.training.train import Prepared, prepare
from bertology_serve.training.train_config import TrainConfig
from tests.training import sets


def trained(encoder: Encoder, task: str = "classification", **values: Any) -> tuple[Prepared, list[Any]]:
    """A delta with random tensors, as if it had been trained."""
    source = sets.source(task)
    ready = prepare(TrainConfig.of(task, max_length=sets.LENGTHS.get(task, 32), **values), encoder, source)
    with torch.no_grad():
        for parameter in ready.live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return ready, list(source.records)


@pytest.mark.parametrize("task", sets.SETS)
def test_the_saved_copy_answers_as_the_live_delta(tmp_path: Path, bert: Encoder, task: str):
    ready, records = trained(bert, task)
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    out = tmp_path / "deltas" / "mine"
    extra = [log, tmp_path / "missing"]
    difference = publish(ready.live.freeze("mine"), ready.live, out, ready.items, records, extra)
    assert 0 <= difference < 1e-5
    assert store.load(out).name == "mine"
    assert (out / "log.jsonl").read_text() == "{}\n"
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_full_fine_tuning_is_compared_on_its_own_weights(tmp_path: Path, bert: Encoder):
    ready, records = trained(bert, method="full")
    publish(ready.live.freeze("mine"), ready.live, tmp_path / "mine", ready.items, records)
    assert store.load(tmp_path / "mine").kinds == ("full",)


def test_a_copy_that_differs_is_not_published(tmp_path: Path, bert: Encoder):
    ready, records = trained(bert)
    delta = ready.live.freeze("mine")
    with torch.no_grad():
        ready.live.tensors["lora-query-b"].add_(0.01)
    with pytest.raises(VerificationError, match=r"differ by .* \(allowed: .*\); nothing was published"):
        publish(delta, ready.live, tmp_path / "mine", ready.items, records)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [float("nan"), float("inf")])
def test_a_copy_that_answers_no_numbers_is_not_published(other: float):
    for expected, found in (([1.0, other], [1.0, 2.0]), ([1.0, 2.0], [1.0, other])):
        with pytest.raises(VerificationError, match="differ by"):
            publishing._difference(torch.tensor(expected), torch.tensor(found), "mine", 3)


def test_a_failed_copy_leaves_what_stood_there(tmp_path: Path, bert: Encoder):
    ready, records = trained(bert)
    publish(ready.live.freeze("mine"), ready.live, tmp_path / "mine", ready.items, records)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with torch.no_grad():
        ready.live.tensors["lora-query-b"].add_(0.01)
    worse = ready.live.freeze("mine")
    with torch.no_grad():
        ready.live.tensors["lora-query-b"].add_(0.01)
    with pytest.raises(VerificationError):
        publish(worse, ready.live, tmp_path / "mine", ready.items, records)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    publish(ready.live.freeze("mine"), ready.live, tmp_path / "mine", ready.items, records)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} != before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_dropout_of_lora_is_for_training_only(tmp_path: Path, bert: Encoder):
    ready, records = trained(bert, options={"lora": {"dropout": 0.5}})
    ready.live.train()
    publish(ready.live.freeze("mine"), ready.live, tmp_path / "mine", ready.items, records)
    assert ready.live.training
    with torch.no_grad():
        assert not torch.equal(*(ready.live(ready.items[0].encodings) for _ in range(2)))


def test_what_stood_there_stays_where_nothing_can_take_its_place(tmp_path: Path, bert: Encoder, monkeypatch):
    """Between the old delta's stepping aside and the new one's coming there was none."""
    ready, records = trained(bert)
    publish(ready.live.freeze("mine"), ready.live, tmp_path / "mine", ready.items, records)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with torch.no_grad():
        ready.live.tensors["lora-query-b"].add_(0.01)
    rename, left = os.rename, iter([True])

    def fails(one: Any, other: Any) -> None:
        if Path(other).name == "mine" and next(left, None):
            raise OSError(28, "No space left on device")
        rename(one, other)

    monkeypatch.setattr("bertology_serve.files._exchanged", lambda one, other: False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(FormatError, match="No space"):
            publish(ready.live.freeze("mine"), ready.live, tmp_path / "mine", ready.items, records)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
