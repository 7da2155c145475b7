"""What a pipeline runs on, settled once."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder import encoder as encoder_module
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.encoder.encoder import Encoder
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
    assert (name, found.engine, pipeline.encoder.prepacked) == ("torch", "torch", torch.float32)
    name, found = apply(pipeline, EngineConfig("onnx", prepack=True))
    assert name.startswith("onnxruntime")
    assert (found.engine, found.prepack, pipeline.encoder.prepacked) == ("onnx", True, None)
    list(pipeline.answer([Request("outputs", {"text": "red and blue"})]))
    assert pipeline.encoder.prepacked is None
    list(pipeline.answer([Request("inputs", {"text": "red and blue"})]))  # the graph has no place for it
    assert pipeline.encoder.prepacked == torch.float32


def batch_of(pipeline: Pipeline) -> tuple[PackedBatch, DeltaBank]:
    encodings = [Encoding(tuple(range(5, 5 + length)), (0,) * length) for length in (3, 12, 7)]
    first, second = pipeline.bank.entries.values()
    owners = [first, BARE, second]
    return pipeline.encoder.pack(encodings, owners), pipeline.bank


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
def test_bf16_rounds_the_products_by_frozen_weights_and_nothing_else(pipeline, monkeypatch):
    exact, modules = pipeline.encoder.run(*batch_of(pipeline)), list(pipeline.encoder._linears())
    monkeypatch.setattr(encoder_module, "pays", lambda dtype: True)
    name, found = apply(pipeline, EngineConfig("auto", "bf16"))
    assert (name, found.engine, found.precision, found.prepack) == ("torch, bf16", "torch", "bf16", True)
    rounded = pipeline.encoder.run(*batch_of(pipeline))
    drift = float((rounded - exact).norm() / exact.norm())
    assert 1e-4 < drift < 3**0.5 * BF16_DRIFT
    x = torch.randn(5, modules[0].in_features)
    weight, bias = modules[0].weight.bfloat16().double(), modules[0].bias.bfloat16().double()
    expected = x.bfloat16().double() @ weight.T + bias
    found_rows = modules[0].prepacked(x)
    assert found_rows.dtype == torch.float32
    assert (found_rows - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert all(parameter.dtype == torch.float32 for parameter in pipeline.encoder.model.parameters())
    again, _ = apply(pipeline, found)  # as it was found: not timed, and the same rows
    assert again == name
    assert torch.equal(pipeline.encoder.run(*batch_of(pipeline)), rounded)
    apply(pipeline, EngineConfig("torch", prepack=False))
    assert torch.equal(pipeline.encoder.run(*batch_of(pipeline)), exact)


def test_where_bf16_is_no_faster_fp32_runs(pipeline, monkeypatch, caplog):
    monkeypatch.setattr(encoder_module, "pays", lambda dtype: False)
    name, found = apply(pipeline, EngineConfig("torch", "bf16"))
    assert (name, found.precision, found.prepack) == ("torch", "fp32", False)
    assert "bf16 is no faster than fp32 on this processor" in caplog.text


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
def test_rows_that_bf16_changes_too_much_are_never_served(pipeline, monkeypatch):
    monkeypatch.setattr(encoder_module, "pays", lambda dtype: True)
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
    encoder = Encoder.load(tiny.save("bert", tmp_path), dtype=torch.bfloat16)
    with pytest.raises(SpecError, match="got bfloat16 on cpu, expected float32 on a CPU; on a GPU give"):
        apply(Pipeline(encoder), EngineConfig("torch", "bf16"))
