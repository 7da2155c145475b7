from __future__ import annotations

import re

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import MODEL, ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.layout import triton_config
from tests import tiny
from tests.export.cases import CLASSES, DELTAS, FOLDS


@pytest.mark.parametrize(
    ("family", "name", "output"),
    [
        ("bert", "folds", '{ name: "logits", data_type: TYPE_FP32, dims: [ 3 ] }'),
        ("roberta", "houlsby-gelu", '{ name: "logits", data_type: TYPE_FP32, dims: [ -1, 3 ] }'),
        ("mpnet", "prefix-shifted", '{ name: "sentence_embedding", data_type: TYPE_FP32, dims: [ 32 ] }'),
        ("mpnet", "prefix-shifted", '{ name: "last_hidden_state", data_type: TYPE_FP32, dims: [ -1, 32 ] }'),
        ("electra", "prefix", '{ name: "start_logits", data_type: TYPE_FP32, dims: [ -1 ] }'),
    ],
)
def test_inputs_and_outputs_are_those_of_the_file(family, name, output, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    parts = ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS[name]), True)
    text = triton_config(parts, labelled=False)
    assert output in text
    assert tuple(re.findall(r'name: "(\w+)", data_type: TYPE_INT64, dims: \[ -1 \]', text)) == parts.inputs
    assert text.count("{") == text.count("}")
    assert text.startswith('backend: "onnxruntime"\n')
    assert "\nname:" not in text  # the directory's


def test_a_model_of_a_model_repository(tmp_path):
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "mood", FOLDS, CLASSES)
    out = tmp_path / "models" / "mood"
    spec = ExportSpec(merge=True, layout="triton")
    done = export_delta(encoder, delta, out, spec)
    assert {"1", "config.pbtxt", "labels.txt", "tokenizer.json", "verification.json"} <= {p.name for p in out.iterdir()}
    assert [path.name for path in (out / "1").iterdir()] == ["model.onnx"]
    assert (out / "labels.txt").read_text() == "bad\ngood\nnone\n"
    assert 'dims: [ 3 ], label_filename: "labels.txt" }' in (out / "config.pbtxt").read_text()
    assert "mood/1/model.onnx" in done.example
    with pytest.raises(SpecError, match="give --overwrite"):
        export_delta(encoder, delta, out, spec)

    flat = export_delta(encoder, delta, tmp_path / "flat", ExportSpec(merge=True, layout="flat"))
    assert (tmp_path / "flat" / "model.onnx").read_bytes() == (out / "1" / "model.onnx").read_bytes()
    assert not (tmp_path / "flat" / "config.pbtxt").exists()
    assert "`model.onnx` is mood" in (tmp_path / "flat" / "README.md").read_text()
    assert "flat/model.onnx" in flat.example
    assert set(MODEL) == {"hf", "flat", "triton"}
