"""``bertology-serve export``: MiniLM for real, once; what is refused, on a small encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

CLASSES = TaskSpec("classification", ("bad", "good", "none"), max_length=48)
TEXTS = ("A text.", "Another one.")


def saved(encoder, directory, specs, name="mood", task=CLASSES, size=0.1):
    delta = tiny.delta(encoder, name, specs, task, size=size)
    store.save(delta, directory, encoder.anatomy, encoder.config.to_dict())
    return delta


def test_minilm_merged_answers_as_the_engine_does(tmp_path, capsys):
    encoder = Encoder.load("minilm")
    delta = saved(encoder, tmp_path / "mood" / "1", [Lora(rank=8), Bitfit()], size=0.02)
    records = tmp_path / "own.jsonl"
    records.write_text(
        "".join(json.dumps({"text": f"Line {i} of the {'very ' * i}long letter."}) + "\n" for i in range(9))
    )
    out = tmp_path / "out"
    arguments = ["export", "--merge", str(tmp_path / "mood"), "--out", str(out), "--verify", str(records)]
    assert main(arguments) == 0
    printed, said = capsys.readouterr()
    assert said.startswith("agrees: onnxruntime ")
    assert ", exported in " in said
    assert len(printed.strip().splitlines()) == 3
    shown: list[np.ndarray] = []
    exec(printed, {"print": shown.append})  # the example, as it stands there
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    asked = [pipeline.prepare(Request("mood", {"text": text}, logits=True)) for text in TEXTS]
    logits = np.array([answer.answer["logits"] for answer in pipeline.run(asked)])
    assert np.abs(shown[0] - logits).max() <= 1e-5
    report = json.loads((out / "verification.json").read_text())
    assert report["passed"]
    assert report["sequences"] > 100
    assert main(arguments) == 2
    assert (
        capsys.readouterr().err
        == f"error: {out} holds an export already; give --overwrite to replace it, or another --out\n"
    )


@pytest.fixture
def prefixed(tmp_path):
    """The directory of a delta that holds a prefix, on a small encoder."""
    saved(tiny.encoder("bert", tmp_path / "base"), tmp_path / "delta", [Lora(), Prefix(2)])
    return tmp_path / "delta"


def test_what_cannot_be_folded_is_refused_by_name(prefixed, tmp_path, capsys):
    assert main(["export", "--merge", str(prefixed), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: delta 'mood' cannot be merged: its prefix cannot be folded into the weights; "
        "give --bake to make that part of the graph, or leave out --merge\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--opset", "9"], "opset is 9; expected 18 to 23"),
        (["--atol", "0"], "atol is 0.0; expected a number above 0"),
        (["--back-end", "torch", "--precision", "int8-row"], "torch's exporter neither unpads nor quantises; take "),
        (["--target", "openvino", "--precision", "int8-row"], "precision int8-row is not for the target openvino; "),
        (["--calibrate", "own.jsonl"], "--calibrate is for --precision int8-static, got fp32; leave it out"),
        (["--layout", "tar"], "Invalid value for '--layout': "),
        (["--verify", "missing.jsonl"], "no file missing.jsonl"),
        (["--backbone", "minilm"], "delta 'mood' was made for"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(more, message, prefixed, tmp_path, capsys):
    assert main(["export", str(prefixed), "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_delta_there(tmp_path, capsys):
    assert main(["export", "--merge", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: no directory ")


def test_many_deltas_in_one_graph_and_one_that_joins(tmp_path, capsys):
    encoder = tiny.encoder("bert", tmp_path / "encoder")
    saved(encoder, tmp_path / "deltas" / "mood" / "1", [Lora(rank=2)])
    saved(encoder, tmp_path / "deltas" / "tone" / "1", [Bitfit()], "tone")
    saved(encoder, tmp_path / "late" / "1", [Prefix(2)], "late")
    out, backbone = tmp_path / "out", ["--backbone", encoder.name]
    assert main(["export", "--multi", str(tmp_path / "deltas"), "--out", str(out), *backbone]) == 0
    printed, said = capsys.readouterr()
    assert said.startswith("agrees: onnxruntime ")
    exec(printed, {"print": lambda logits: None})
    assert main(["export", "--multi", "--join", str(tmp_path / "late"), "--out", str(out), *backbone]) == 0
    assert "late" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "late"), str(tmp_path / "deltas"), "--out", str(out)]) == 2
    assert capsys.readouterr().err == "error: got 2 deltas; one graph for several of them is --multi\n"
