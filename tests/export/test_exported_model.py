"""Exports that answer again behind the pipeline, beside the deltas of another encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, NotFound, SpecError
from bertology_serve.export import exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.onnx_engine import OnnxModel, exports
from tests import tiny
from tests.encoder.test_mixed import DELTAS, logits, record

NAMES = {"lora-1": "hf", "pfeiffer": "flat", "prefix": "hf", "prefix-shifted": "hf", "bitfit-qkv": "flat"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Encoder, Path]:
    """An encoder, and exports of deltas of five tasks."""
    root = tmp_path_factory.mktemp("served")
    encoder = tiny.encoder("roberta", root / "encoder")
    with pytest.MonkeyPatch.context() as patched:
        real = exporting.built_in
        patched.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::9])
        for name, layout in NAMES.items():
            spec = ExportSpec(merge=True, bake=True, layout=layout)
            export_delta(encoder, tiny.delta(encoder, name, *DELTAS[name]), root / "exports" / name, spec)
    return encoder, root / "exports"


def asked(pipeline: Pipeline, names) -> list:
    return [
        pipeline.prepare(Request(name, record(DELTAS[name][1], i), logits=True)) for i in range(3) for name in names
    ]


def test_the_answers_of_the_deltas_that_were_exported(pair, tmp_path):
    encoder, root = pair
    own = Pipeline(encoder)
    for name in NAMES:
        own.add(tiny.delta(encoder, name, *DELTAS[name]))
    expected = own.run(asked(own, NAMES))
    other = Pipeline(tiny.encoder("bert", tmp_path))  # the exports bring their own encoder and tokenizer
    other.add(tiny.delta(other.encoder, "houlsby", *DELTAS["houlsby"]))
    for path in exports(root):
        model = OnnxModel.open(path)
        other.add_model(model.delta, model)
    found = other.run(asked(other, [*NAMES, "houlsby"]))
    alone = other.run(asked(other, ["houlsby"]))
    mine = [answer for answer in found if answer.delta != "houlsby"]
    for one, two in zip([*mine, *alone], [*expected, *(a for a in found if a.delta == "houlsby")], strict=True):
        assert (one.delta, one.version, one.task) == (two.delta, two.version, two.task)
        assert one.answer.keys() == two.answer.keys()
        if one.task == "embedding":  # of unit length already as it leaves the graph
            assert one.answer["embedding"] == pytest.approx(two.answer["embedding"], abs=1e-5)
        else:
            assert (logits(one.as_dict()) - logits(two.as_dict())).abs().max() <= 1e-5
    with pytest.raises(SpecError, match="'prefix-shifted' answers already; export the model under another --name"):
        other.add_model(model.delta, model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
        (lambda path: (path / "config.json").write_text("{}"), "was not exported by bertology-serve"),
        (lambda path: spoiled(path, task="many"), "no export of a single delta"),
        (lambda path: spoiled(path, labels="["), "no export of a single delta"),
        (lambda path: spoiled(path, task_options="{}"), "no export of a single delta"),
        (lambda path: spoiled(path, max_length="2"), "at least 3 tokens are needed"),
    ],
)
def test_what_is_no_export(spoil, message, pair, tmp_path):
    shutil.copytree(pair[1] / "lora-1", tmp_path / "export")
    spoil(tmp_path / "export")
    with pytest.raises(FormatError, match=message):
        OnnxModel.open(tmp_path / "export")
    with pytest.raises(NotFound, match="no export in"):
        exports(tmp_path / "none")


def spoiled(path: Path, **facts: str) -> None:
    config = json.loads((path / "config.json").read_text())
    config["bertology_serve"] |= facts
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["lora-1", "pfeiffer"])
def test_an_export_is_one_whatever_its_layout(name, pair):
    """The file of the layout hf lies in a directory of its own, which is no second export."""
    assert exports(pair[1] / name) == [pair[1] / name]
    assert exports(pair[1]) == [pair[1] / name for name in sorted(NAMES)]
