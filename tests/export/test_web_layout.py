"""The layout for browsers: a file for each delta, which together are the library that a graph for many takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import FormatError, SpecError, Unsupported
from bertology_serve.export import exporting, web_layout
from bertology_serve.export.delta_library import library_of
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta, export_many, join
from tests import tiny
from tests.export.emitter.mixed import EVERY


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    return {name: tiny.encoder(name, tmp_path_factory.mktemp(name)) for name in ("bert", "modernbert")}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A directory whose graph nobody reads."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(b"graph")
    return tmp_path


def made(encoder: Encoder, *names: str):
    return [tiny.delta(encoder, name, *EVERY[name], seed=list(EVERY).index(name)) for name in names or EVERY]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_files_are_the_library(family, encoders, stage):
    deltas = made(encoders[family])
    web_layout.save(stage, encoders[family], deltas[:9])
    web_layout.save(stage, encoders[family], deltas[9:])
    expected, found = library_of(encoders[family], deltas), web_layout.load(stage, encoders[family])
    assert found.cards == expected.cards
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert np.array_equal(found.arrays[name], array), name


def test_a_file_holds_what_a_delta_changes_and_nothing_else(encoders, stage):
    """And the base's pooler lies there once, whoever reads it."""
    web_layout.save(stage, encoders["bert"], made(encoders["bert"], "lora-one-layer", "folds", "probe"))
    manifest = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))
    cards = {card["name"]: card for card in manifest["deltas"]}
    assert list(cards) == ["base", "lora-one-layer", "folds", "probe"]
    assert cards["folds"]["task"] == json.loads(json.dumps(asdict(EVERY["folds"][1])))
    assert cards["folds"]["files"] == ["deltas/folds.safetensors", "onnx/head.safetensors"]
    assert cards["probe"]["files"] == ["deltas/probe.safetensors"]
    shapes = {name: array.shape for name, array in load_file(stage / "deltas/lora-one-layer.safetensors").items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("head.")} == {
        "query.a": (3, 3, 32), "query.b": (3, 3, 32), "query.ranks": (1, 3), "query.bias": (1, 1)
    }  # fmt: skip
    assert [*load_file(stage / "onnx/head.safetensors")] == ["head.dense", "head.dense_bias"]
    assert manifest["files"] == {
        str(path.relative_to(stage)): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in stage.rglob("*.*")
        if path.suffix != ".json"
    }


def test_exported_joined_and_verified(encoders, tmp_path, monkeypatch):
    real = exporting.built_in
    monkeypatch.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::12])
    encoder, out = encoders["bert"], tmp_path / "out"
    done = export_many(encoder, made(encoder, "lora", "pfeiffer"), out, ExportSpec(layout="web"))
    assert done.example.startswith('import { Pipeline } from "bertology-serve-web";')
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    join(encoder, made(encoder, "folds"), out)
    changed = {path.name for path in out.rglob("*.*") if before.get(path) != path.read_bytes()}
    assert changed == {"folds.safetensors", "head.safetensors", "manifest.json", "README.md"}
    assert "```js\nimport" in (out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SpecError, match="delta 'lora' is there already"):
        join(encoder, made(encoder, "lora"), out)


def test_what_cannot_be(encoders, stage, monkeypatch):
    encoder = encoders["bert"]
    with pytest.raises(SpecError, match="--layout web is for many deltas; give --multi"):
        export_delta(encoder, made(encoder, "lora")[0], stage / "out", ExportSpec(layout="web"))
    with monkeypatch.context() as changed:
        changed.setattr(encoder.tokenizer, "truncation_side", "left")
        with pytest.raises(
            Unsupported, match=r"cuts texts from their start \(truncation_side\), which the web package"
        ):
            web_layout.save(stage, encoder, made(encoder, "lora"))
    web_layout.save(stage, encoder, made(encoder, "lora"))
    (stage / "onnx/model.onnx_data").touch()
    with pytest.raises(Unsupported, match=r"more than 1\.8 GB, which no browser tab holds"):
        web_layout.save(stage, encoder, [])
    (stage / "deltas/lora.safetensors").write_bytes(b"no tensors")
    with pytest.raises(FormatError, match="no deltas for the web"):
        web_layout.load(stage, encoder)
    (stage / "manifest.json").write_text('{"format": "another"}', encoding="utf-8")
    with pytest.raises(FormatError, match="has format another; expected bertology-serve-web/1"):
        web_layout.load(stage, encoder)
