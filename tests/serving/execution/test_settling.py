"""What a pipeline runs on, settled once."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.linear import available
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import SpecError, VerificationError
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.serving.execution import engine_choice
from bertology_serve.serving.execution.engine_choice import BF16_DRIFT, EngineConfig, apply
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny

TASK = TaskSpec("classification", ("no", "yes"), 16)


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    made = Pipeline(tiny.encoder("bert", tmp_path))
    made.add(tiny.delta(made.encoder, "outputs", [Ia3(("value",), ())], TASK, 0))
    made.add(tiny.delta(made.encoder, "inputs", [Ia3(("value",), ("up",))], TASK, 1))
    return made


@pytest.mark.skipif(not available(), reason="needs a torch with oneDNN")
def test_weights_are_laid_out_for_the_engine_that_reads_them(pipeline):
    name, found = apply(pipeline, EngineConfig("torch", prepack=True))
    assert (name, found.engine, pipeline.encoder.prepacked) == ("torch", "torch", True)
    name, found = apply(pipeline, EngineConfig("onnx", prepack=True))
    assert name.startswith("onnxruntime")
    assert (found.engine, found.prepack, pipeline.encoder.prepacked) == ("onnx", True, False)
    list(pipeline.answer([Request("outputs", {"text": "red and blue"})]))
    assert not pipeline.encoder.prepacked
    list(pipeline.answer([Request("inputs", {"text": "red and blue"})]))  # the graph has no place for it
    assert pipeline.encoder.prepacked


def batch_of(pipeline: Pipeline) -> tuple[PackedBatch, DeltaBank]:
    encodings = [Encoding(tuple(range(5, 5 + length)), (0,) * length) for length in (3, 12, 7)]
    first, second = pipeline.bank.entries.values()
    owners = [first, BARE, second]
    return pipeline.encoder.pack(encodings, owners), pipeline.bank


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
def test_bf16_rounds_the_encoder_and_its_deltas_for_good(pipeline, monkeypatch):
    exact = pipeline.encoder.run(*batch_of(pipeline))
    monkeypatch.setattr(engine_choice, "pays", lambda dtype: True)
    name, found = apply(pipeline, EngineConfig("auto", "bf16"))
    assert (name, found.engine, found.precision, found.prepack) == ("torch, bf16", "torch", "bf16", True)
    assert pipeline.encoder.dtype == pipeline.bank.dtype == torch.bfloat16
    rounded = pipeline.encoder.run(*batch_of(pipeline))
    assert rounded.dtype == torch.bfloat16
    assert 1e-4 < float((rounded.float() - exact).norm() / exact.norm()) < 3**0.5 * BF16_DRIFT
    answer = next(iter(pipeline.answer([Request("outputs", {"text": "red and blue"}, logits=True)]))).as_dict()
    assert any(torch.tensor(answer["logits"]) != torch.tensor(answer["logits"]).bfloat16())  # heads stay float32
    for again in (found, EngineConfig("torch", "bf16")):  # as it was found, and asked anew: the same rows
        assert apply(pipeline, again)[0] == name
        assert torch.equal(pipeline.encoder.run(*batch_of(pipeline)), rounded)
    pipeline.add(tiny.delta(pipeline.encoder, "later", [Ia3(("value",), ())], TASK, 2))
    assert len(list(pipeline.answer([Request("later", {"text": "red"})]))) == 1


def test_where_bf16_is_no_faster_fp32_runs(pipeline, monkeypatch, caplog):
    monkeypatch.setattr(engine_choice, "pays", lambda dtype: False)
    name, found = apply(pipeline, EngineConfig("torch", "bf16"))
    assert (name, found.precision, found.prepack) == ("torch", "fp32", False)
    assert "bf16 is no faster than fp32 on this processor" in caplog.text


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
def test_rows_that_bf16_changes_too_much_are_never_served(pipeline, monkeypatch):
    monkeypatch.setattr(engine_choice, "pays", lambda dtype: True)
    monkeypatch.setattr(engine_choice, "BF16_DRIFT", 1e-6)
    with pytest.raises(
        VerificationError, match=r"torch in bf16 gives other rows than torch: .*; leave out --precision"
    ):
        apply(pipeline, EngineConfig("torch", "bf16"))


def test_precisions_that_an_engine_does_not_have(pipeline):
    for engine, precision, why in (
        ("onnx", "bf16", "--precision bf16 is torch's engine's; give --engine torch or auto"),
        ("torch", "int8-row", "--precision int8-row is the ONNX engine's; give --engine onnx or auto"),
    ):
        with pytest.raises(SpecError, match=why):
            apply(pipeline, EngineConfig(engine, precision))


def test_bf16_is_for_float32_on_a_cpu(tmp_path):
    pipeline = Pipeline(tiny.encoder("bert", tmp_path))
    pipeline.encoder.model.to(torch.float16)
    with pytest.raises(SpecError, match="got float16 on cpu, expected float32 on a CPU; on a GPU give"):
        apply(pipeline, EngineConfig("torch", "bf16"))
