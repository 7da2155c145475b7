"""Whole exports: torch's exporter takes seconds each, so a family gets one with everything in it, and the rest share
them. The emitter is tried in every combination by ``emitter/test_emit.py``."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

import bertology_serve
from bertology_serve.errors import BaseMismatch, SpecError, Unsupported, VerificationError
from bertology_serve.export import export_directory, exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import Exported, export_delta
from bertology_serve.export.onnx_engine import OnnxModel
from bertology_serve.export.samples import Reference
from bertology_serve.kinds.lora import Lora
from tests import tiny
from tests.export.cases import (
    ALONE,
    ANSWERS,
    CLASSES,
    DELTAS,
    EVERYTHING,
    FOLDS,
    SCORES,
    TAGS,
    VECTORS,
    encodings,
    padded,
    ran,
    small,
)

ROOT = Path(__file__).parents[2]
BAKED = {name: ExportSpec(merge=True, bake=True, back_end=name) for name in ("auto", "direct", "torch")}
TASKS = {"bert": CLASSES, "modernbert": ANSWERS, "deberta-v2": TAGS, "distilbert": VECTORS, "mpnet": SCORES}


OUTPUTS = {
    "question-answering": ["start_logits", "end_logits"],
    "embedding": ["last_hidden_state", "sentence_embedding"],
}


class Made:
    """An export and what it was made of."""

    def __init__(self, family: str, directory: Path, specs=EVERYTHING, task=None, spec=BAKED["auto"]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            self.encoder = small(family, directory / "base", patch)
        self.delta = tiny.delta(self.encoder, "mine", specs, task or TASKS[family])
        self.done: Exported = export_delta(self.encoder, self.delta, directory / "out", spec)

    @property
    def file(self) -> Path:
        return self.done.directory / "onnx" / "model.onnx"


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Callable[[str, str], Made]:
    """A family with every kind baked, each family with another task; exported once by each back end."""
    return functools.cache(lambda family, back_end: Made(family, tmp_path_factory.mktemp(family), spec=BAKED[back_end]))


@pytest.fixture(params=[*((family, "direct") for family in TASKS), ("bert", "torch"), ("distilbert", "torch")])
def made(request, exports) -> Made:
    return exports(*request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Made:
    return Made("bert", tmp_path_factory.mktemp("folded"), FOLDS, CLASSES, ExportSpec(merge=True))


def run(file: Path, arrays: list[torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_inputs()]
    return ran(session, {name: array.numpy() for name, array in zip(names, arrays, strict=False)})


def test_onnx_runtime_agrees_with_the_engine(made):
    """Checked here by hand too, on inputs that the verifier did not see."""
    report, task = made.done.report, made.delta.task
    assert report.passed
    assert report.largest <= 1e-5
    assert report.provider == "CPUExecutionProvider"
    shapes = [one.shape for one in report.shapes]
    assert shapes[0] == "1×1 right"
    assert {f"2×{task.max_length} right", f"2×{task.max_length} left"} <= set(shapes)
    assert len(set(shapes)) >= 16
    sequences = encodings((6, 1, 11), typed=made.encoder.anatomy.family == "bert", seed=9)
    for one, expected, left in zip(
        sequences, Reference(made.encoder, made.delta).outputs(sequences), (0, 1, 1), strict=True
    ):
        ids, mask, types = padded([one], bool(left), extra=4)
        out = run(made.file, [ids, mask, types])[0]
        out = out[mask[0].bool().numpy()] if task.per_token else out
        assert np.abs(out - expected.numpy()).max() <= 1e-5


def test_the_file_says_what_it_is(made):
    model, task = onnx.load(made.file), made.delta.task
    onnx.checker.check_model(model, full_check=True)
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert list(facts) == sorted(facts)
    assert facts["task"] == task.kind
    assert json.loads(facts["labels"]) == list(task.labels)
    assert json.loads(facts["kinds"]) == ["lora", "bitfit", "adapter", "prompt", "prefix"]
    assert facts["base_sha256"] == made.encoder.ref.sha256
    assert facts["base_name"] == "base"
    assert facts["max_length"] == str(task.max_length)
    assert facts["pooling"] == task.pooling
    direct = facts["back_end"] == "direct"
    assert json.loads(facts["unpadded"]) is direct
    assert any(node.op_type == "NonZero" for node in model.graph.node) is direct
    assert facts["tool"] == f"bertology-serve {bertology_serve.__version__}"
    dims = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "sequence"]
    assert [found.name for found in model.graph.output] == OUTPUTS.get(task.kind, ["logits"])
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]


@pytest.mark.parametrize("back_end", ["direct", "torch"])
def test_rows_lie_beside_the_embedding_where_the_caller_has_them(back_end, exports):
    """Pooled by the caller they are the embedding: what sentence-transformers does with them."""
    made = exports("distilbert", back_end)
    session = onnxruntime.InferenceSession(str(made.file), providers=["CPUExecutionProvider"])
    for left in (False, True):
        ids, mask, _ = padded(encodings((6, 1, 11), typed=False), left, extra=2)
        rows, pooled = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        assert rows.shape == (*ids.shape, 32)
        assert not rows[mask.numpy() == 0].any()
        mean = rows.sum(1) / mask.numpy().sum(1, keepdims=True)
        assert np.abs(mean / np.linalg.norm(mean, axis=1, keepdims=True) - pooled).max() <= 1e-5


def test_nothing_of_this_machine_is_in_any_file(made):
    here = [str(ROOT), str(Path.home()), sys.prefix, str(made.done.directory.parent), "site-packages"]
    for path in made.done.directory.rglob("*"):
        if path.is_file():
            assert [text for text in here if text.encode() in path.read_bytes()] == [], path.name
    assert not any(node.metadata_props or node.doc_string for node in onnx.load(made.file).graph.node)


@pytest.mark.parametrize("back_end", ["direct", "torch"])
def test_another_process_writes_the_same_bytes(back_end, exports, tmp_path):
    """With another hash seed and another place on disk."""
    family = "modernbert" if back_end == "direct" else "distilbert"
    first = exports(family, back_end)
    code = (
        "import sys; from pathlib import Path; from tests.export.test_exporting import BAKED, Made; "
        f"Made({family!r}, Path(sys.argv[1]), spec=BAKED[{back_end!r}])"
    )
    seed = "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8"
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == first.file.read_bytes()


def test_without_merge_another_delta_can_take_its_place(tmp_path):
    """The delta's initialisers, put in for those of another of the same form, make the other's answers."""
    made = Made("roberta", tmp_path, [Lora(rank=2)], SCORES, ExportSpec())
    other = tiny.delta(made.encoder, "other", [Lora(rank=2)], SCORES, seed=5)
    model = onnx_ir.load(made.file)
    own = {name: value for name, value in model.graph.initializers.items() if name.startswith("delta.mine.")}
    low = other.effects(made.encoder.anatomy).low_rank
    new = {f"head.{name}": t.T if name.endswith("weight") else t for name, t in other.head.items()}
    for slot, update in low.items():
        new |= {f"{slot}.{i}.a": update.a[i].T for i in range(2)} | {f"{slot}.{i}.b": update.b[i] for i in range(2)}
    assert {name.removeprefix("delta.mine.") for name in own} == set(new)
    for name, value in own.items():
        tensor = new[name.removeprefix("delta.mine.")].contiguous().numpy()
        assert tuple(value.const_value.shape) == tensor.shape
        value.const_value = onnx_ir.tensor(tensor, name=name)
    onnx_ir.save(model, tmp_path / "other.onnx")
    sequences = encodings((9,), typed=False)
    mine, others = (Reference(made.encoder, delta).outputs(sequences)[0].numpy() for delta in (made.delta, other))
    arrays = padded(sequences, left=False)
    assert np.abs(run(tmp_path / "other.onnx", arrays)[0] - others).max() <= 1e-5
    assert np.abs(run(made.file, arrays)[0] - others).max() > 1e-2
    assert np.abs(run(made.file, arrays)[0] - mine).max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "what"), [("houlsby", "bottleneck adapter"), ("everything", "soft prompt and prefix")]
)
def test_merging_what_cannot_be_folded_is_refused_by_name(name, what, tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    with pytest.raises(Unsupported, match=f"{what} cannot be folded into the weights; give --bake"):
        export_delta(encoder, tiny.delta(encoder, "x", *DELTAS[name]), tmp_path / "out", ExportSpec(merge=True))
    assert not (tmp_path / "out").exists()


def test_what_differs_is_not_published(bert, tmp_path, monkeypatch):
    """The file of one delta, offered for another."""
    monkeypatch.setattr(exporting, "write", lambda *_: onnx_ir.load(bert.file))
    other = tiny.delta(bert.encoder, "other", FOLDS, CLASSES, seed=8)
    with pytest.raises(VerificationError, match=r"DIFFERS: onnxruntime .* nothing was published"):
        export_delta(bert.encoder, other, tmp_path / "out", ExportSpec(merge=True))
    assert list(tmp_path.iterdir()) == []
    export_delta(bert.encoder, bert.delta, tmp_path / "out", ExportSpec(merge=True))
    before = (tmp_path / "out" / "verification.json").read_bytes()
    with pytest.raises(VerificationError):
        export_delta(bert.encoder, other, tmp_path / "out", ExportSpec(merge=True, overwrite=True))
    assert (tmp_path / "out" / "verification.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_only_when_asked(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write", lambda *_: onnx_ir.load(bert.file))
    export_delta(bert.encoder, bert.delta, tmp_path / "out", ExportSpec(merge=True))
    (tmp_path / "out" / "stale.txt").write_text("x")
    with pytest.raises(SpecError, match="give --overwrite"):
        export_delta(bert.encoder, bert.delta, tmp_path / "out", ExportSpec(merge=True))
    export_delta(bert.encoder, bert.delta, tmp_path / "out", ExportSpec(merge=True, overwrite=True), name="again")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert (tmp_path / "out" / "README.md").read_text().startswith("# again\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_current_directory_may_be_filled(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write", lambda *_: onnx_ir.load(bert.file))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_delta(bert.encoder, bert.delta, Path(), ExportSpec(merge=True))
    assert (tmp_path / "here" / "onnx" / "model.onnx").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_records_of_the_caller_are_verified_too(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write", lambda *_: onnx_ir.load(bert.file))
    own = [[one] for one in encodings(tuple(range(3, 22)), typed=True)]
    done = export_delta(bert.encoder, bert.delta, tmp_path / "out", ExportSpec(merge=True), records=own)
    assert done.report.sequences == bert.done.report.sequences + 19
    assert [one.shape for one in done.report.shapes[-3:]] == ["8×10 right", "8×18 left", "3×21 right"]


def test_8_bits_are_published_where_they_stay_close(bert, tmp_path):
    spec = ExportSpec(merge=True, precision="int8-row")
    done = export_delta(bert.encoder, bert.delta, tmp_path / "out", spec)
    assert 0 < done.report.drift < 0.05
    model = onnx.load(done.directory / "onnx" / "model.onnx")
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts["precision"] == "int8-row"
    assert "‖Δ‖/‖·‖ at most 0.057 against the unmerged float32" in facts["verification"]
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    assert kinds["encoder.layer.0.attention.self.query.weight"] == onnx.TensorProto.INT8
    assert kinds["encoder.layer.0.attention.self.query.weight_scale"] == onnx.TensorProto.FLOAT
    with pytest.raises(VerificationError, match=r"drift .* nothing was published: give a larger --max-drift"):
        export_delta(bert.encoder, bert.delta, tmp_path / "no", ExportSpec(precision="int8-row", max_drift=1e-4))
    assert not (tmp_path / "no").exists()


def test_what_a_precision_costs_is_said(bert, tmp_path):
    spec = ExportSpec(merge=True, precision="int8-dynamic")
    done = export_delta(bert.encoder, bert.delta, tmp_path / "dynamic", spec)
    assert done.report.neighbours > 1e-4
    assert len(done.cautions) == 1
    assert done.cautions[0].startswith("answers depend on the rest of the batch: neighbours changed a row by up to 0.")
    assert f"**Beware:** {done.cautions[0]}." in (tmp_path / "dynamic" / "README.md").read_text()
    assert 0 < done.report.lost["float16"] < done.report.lost["bfloat16"] < 0.1
    half = export_delta(bert.encoder, bert.delta, tmp_path / "half", ExportSpec(merge=True, precision="fp16"))
    assert half.cautions == ()
    assert half.report.drift < 0.002
    assert half.bytes < 0.75 * bert.done.bytes
    report = json.loads((tmp_path / "half" / "verification.json").read_text())
    assert report["lost"] == half.report.lost
    assert report["neighbours_allowed"] == pytest.approx(0.004 * 2**0.5 * report["scale"])


def test_large_weights_lie_beside_the_model_and_are_verified_there(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(export_directory, "EXTERNAL_OVER", 1000)
    done = export_delta(bert.encoder, bert.delta, tmp_path / "out", ExportSpec(merge=True))
    names = {path.name for path in (tmp_path / "out" / "onnx").iterdir()}
    assert names == {"model.onnx", "model.onnx_data"}
    assert done.bytes == sum((tmp_path / "out" / "onnx" / name).stat().st_size for name in names)
    assert done.report.largest == bert.done.report.largest
    arrays = padded(encodings((5,), typed=True), left=False)
    assert np.array_equal(run(tmp_path / "out" / "onnx" / "model.onnx", arrays), run(bert.file, arrays))


def test_for_cuda_the_provider_that_ran_is_said(bert, tmp_path):
    spec = ExportSpec(merge=True, precision="fp16", target="cuda", layout="triton")
    done = export_delta(bert.encoder, bert.delta, tmp_path / "out", spec)
    assert done.report.asked == "CUDAExecutionProvider"
    if done.report.provider == "CPUExecutionProvider":
        assert done.cautions[-1].startswith("CUDAExecutionProvider was asked for, but CPUExecutionProvider ran")
    assert "KIND_GPU" in (tmp_path / "out" / "config.pbtxt").read_text()
    model = onnx.load(tmp_path / "out" / "1" / "model.onnx")
    assert {one.domain for one in model.opset_import} == {"", "com.microsoft"}


def test_a_delta_of_other_weights_is_refused(bert, tmp_path):
    stranger = tiny.encoder("bert", tmp_path / "stranger", seed=4)
    with pytest.raises(BaseMismatch):
        export_delta(stranger, bert.delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_is_refused(bert, tmp_path):
    bert.encoder.model.to(torch.bfloat16)
    try:
        with pytest.raises(Unsupported, match=r"torch.bfloat16 on cpu; load it in float32"):
            export_delta(bert.encoder, bert.delta, tmp_path / "out")
    finally:
        bert.encoder.model.to(torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-row"])
@pytest.mark.parametrize("name", ALONE)
def test_what_texts_are_searched_by(name, precision, tmp_path):
    """Answered by the file as by torch; the word embeddings are in it once."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, name, *ALONE[name])
    spec = ExportSpec(merge=True, bake=True, precision=precision, max_drift=0.1 if precision == "int8-row" else None)
    done = export_delta(encoder, delta, tmp_path / "out", spec)
    model = onnx.load(done.directory / "onnx" / "model.onnx")
    assert [one.name for one in model.graph.output] == ["sparse_embedding" if name == "words" else "token_embeddings"]
    words = encoder.model.get_input_embeddings().weight.shape
    assert [sorted(one.dims) for one in model.graph.initializer].count(sorted(words)) == 1
    if precision == "fp32":
        served, whole = OnnxModel.open(done.directory), Reference(encoder, delta)
        assert (served.delta.task.kind, served.delta.task.width) == (delta.task.kind, delta.task.width)
        texts = encodings((3, 9, 17), typed=True)
        for mine, theirs in zip(served.outputs(texts), whole.outputs(texts), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    with pytest.raises(Unsupported, match=f"does {delta.task.kind}, for which a graph for many has no head"):
        exporting.export_many(encoder, [delta], tmp_path / "many")
