"""The engine of a server: asked for, or the faster one of two that agree."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import SpecError, Unsupported, VerificationError
from bertology_serve.export.onnx_engine import OnnxEngine
from bertology_serve.serving.execution import engine_choice
from bertology_serve.serving.versions.delta_registry import Registry
from tests import tiny
from tests.serving.conftest import RECORDS
from tests.serving.running import running


@pytest.fixture
def loaded(encoder, deltas: Path) -> Pipeline:
    registry = Registry(Pipeline(encoder))
    registry.load(deltas)
    return registry.pipeline


@pytest.mark.parametrize(("seconds", "takes"), [((2.0, 1.0), "onnxruntime"), ((1.0, 2.0), "torch")])
def test_auto_takes_the_faster_one_and_says_so(seconds, takes, loaded, monkeypatch, caplog):
    monkeypatch.setattr(engine_choice, "race", lambda one, other: seconds)
    with caplog.at_level(logging.INFO):
        name = engine_choice.settle(loaded, "auto")
    assert name.startswith(takes)
    assert isinstance(loaded.engine, OnnxEngine) == (takes == "onnxruntime")
    assert f"{1e3 * seconds[1]:.1f} ms against torch's {1e3 * seconds[0]:.1f} for " in caplog.text


def test_every_route_gives_torchs_answers(loaded, deltas):
    records = [{"delta": name, "logits": True, **record} for name, record in RECORDS.items()]
    with running(loaded, root=deltas) as server:
        expected = server.post("/predict", records).json()
        engine_choice.settle(loaded, "onnx")
        found = server.post("/predict", records).json()
        for one, other in zip(found, expected, strict=True):
            assert flat(one["logits"]) == pytest.approx(flat(other["logits"]), abs=1e-5)
        Registry(loaded, deltas).remove("mood")
        assert server.post("/predict", records[:1]).status_code == 404
        Registry(loaded, deltas).put("mood")
        again = server.post("/predict", records[:1]).json()[0]
        assert flat(again["logits"]) == pytest.approx(flat(expected[0]["logits"]), abs=1e-5)


def flat(logits) -> list[float]:
    return [number for row in logits for number in (flat(row) if isinstance(row, list) else [row])]


def test_auto_falls_back_to_torch_and_says_why(loaded, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with caplog.at_level(logging.INFO):
        assert engine_choice.settle(loaded, "auto") == "torch"
    assert "ONNX Runtime is not installed" in caplog.text
    with pytest.raises(Unsupported, match="ONNX Runtime is not installed"):
        engine_choice.settle(loaded, "onnx")
    assert loaded.engine is loaded.encoder


def test_rows_that_differ_are_never_served(loaded, monkeypatch):
    monkeypatch.setattr(OnnxEngine, "run", lambda self, batch, bank: loaded.encoder.run(batch, bank) + 0.5)
    with pytest.raises(VerificationError, match=r"max \|Δ\| 5.0e-01, drift .*; take --engine torch"):
        engine_choice.settle(loaded, "onnx")
    assert engine_choice.settle(loaded, "auto") == "torch"
    with pytest.raises(VerificationError):
        engine_choice.settle(loaded, "onnx", "int8-row")


@pytest.mark.parametrize("precision", ["fp32", "int8-row"])
def test_rows_that_are_no_numbers_are_never_served(precision, loaded, monkeypatch):
    monkeypatch.setattr(OnnxEngine, "run", lambda self, batch, bank: loaded.encoder.run(batch, bank) * float("nan"))
    with pytest.raises(VerificationError, match=r"max \|Δ\| nan"):
        engine_choice.settle(loaded, "onnx", precision)


def test_8_bits(loaded):
    jobs = [loaded.prepare(Request("raw", RECORDS["raw"]))]
    expected = loaded.run(jobs)[0].answer["embedding"]
    assert engine_choice.settle(loaded, "onnx", "int8-row").endswith(", int8-row")
    found = loaded.run(jobs)[0].answer["embedding"]
    assert found != expected
    assert found == pytest.approx(expected, abs=0.2)
    with pytest.raises(SpecError, match="give --engine onnx or auto"):
        engine_choice.check("torch", "int8-row")


def test_a_server_without_deltas(tmp_path):
    bare = Pipeline(tiny.encoder("distilbert", tmp_path))
    assert engine_choice.settle(bare, "onnx").startswith("onnxruntime")
    assert engine_choice.settle(bare, "torch") == "torch"
    slow, fast = engine_choice.race(lambda: sum(range(200_000)), lambda: None)
    assert slow > fast


@pytest.mark.parametrize(("short", "mixed", "taken"), [(0.5, 1.1, "onnx"), (0.9, 1.2, "torch"), (1.2, 0.5, "onnx")])
def test_auto_weighs_a_short_text_and_a_mixed_batch_alike(short, mixed, taken, loaded, monkeypatch):
    ratios = iter((short, mixed))
    monkeypatch.setattr(engine_choice, "race", lambda one, other: (1.0, next(ratios)))
    assert taken in engine_choice.settle(loaded, "auto")
    assert next(ratios, None) is None
