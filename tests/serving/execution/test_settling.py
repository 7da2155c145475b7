"""What a pipeline runs on, settled once."""

from __future__ import annotations

import pytest

from bertology_serve.encoder.linear import available
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.serving.execution.engine_choice import EngineConfig, apply
from bertology_serve.tasks.spec import TaskSpec
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
