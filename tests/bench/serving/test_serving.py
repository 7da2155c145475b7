from __future__ import annotations

import sys

import pytest
import torch

from bertology_serve.bench.serving import peft_contenders, serving
from bertology_serve.bench.serving.peft_contenders import Contender
from bertology_serve.bench.serving.texts_workload import Workload
from bertology_serve.errors import VerificationError

WORK = Workload(16, 3, mean=10.0, longest=32)


def test_all_contenders_give_the_same_rows(encoder):
    deltas = peft_contenders.make_deltas(encoder, WORK)
    ours, none = peft_contenders.ours(encoder, WORK, deltas)
    arrives, sorted_ = peft_contenders.peft(encoder, WORK, deltas)
    for other in (arrives, sorted_):
        serving.check(ours, other)
    with pytest.raises(VerificationError, match="nothing was timed"):
        serving.check(ours, none)


def test_nothing_is_timed_that_is_not_a_number():
    ours = Contender("ours", lambda: torch.zeros(1))
    with pytest.raises(VerificationError):
        serving.check(ours, Contender("other", lambda: torch.full((1,), torch.nan)))


def test_a_run(encoder):
    result = serving.run(encoder.name, WORK, rounds=2, threads=1)
    assert [timed.name for timed in result.times] == [
        "ours", "ours, no delta", "peft, as it arrives", "peft, sorted in 16s",
    ]  # fmt: skip
    assert result.missing == ""
    assert result.everything["environment"]["engine"] == "torch"
    assert all(one.measured is not None for one in result.judged)


def test_the_onnx_engine(encoder):
    result = serving.run(encoder.name, WORK, rounds=1, threads=1, engine="onnx")
    assert result.everything["environment"]["engine"].startswith("onnxruntime ")
    assert [timed.name for timed in result.times][:2] == ["ours", "ours, no delta"]


def test_without_peft_its_rows_are_left_out(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = serving.run(encoder.name, WORK, rounds=1)
    assert [timed.name for timed in result.times] == ["ours", "ours, no delta"]
    assert "peft is not installed" in result.missing
    assert [one.verdict for one in result.judged][:2] == ["not run", "not run"]
