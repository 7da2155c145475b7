from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export import exporting
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.openvino_ir import OpenVinoSession, save_ir
from bertology_serve.export.samples import Case, Reference
from tests import tiny
from tests.export.cases import ANSWERS, CLASSES, EVERYTHING, FOLDS, TAGS, VECTORS, encodings

CASES = {
    "classes": ("bert", FOLDS, CLASSES, {}),
    "tags": ("bert", EVERYTHING, TAGS, {"bake": True}),
    "answers": ("deberta-v2", FOLDS, ANSWERS, {}),
    "vectors": ("distilbert", FOLDS, VECTORS, {"back_end": "torch"}),
    "static": ("bert", FOLDS, CLASSES, {"precision": "int8-static", "max_drift": 0.3}),
}
FILE = "openvino_model.xml"


@pytest.mark.parametrize("name", ["openvino", "nncf"])
def test_without_the_packages_it_says_what_to_install(name, tmp_path, monkeypatch):
    runtime = SimpleNamespace(Core=lambda: SimpleNamespace(read_model=lambda path: path), __version__="1")
    monkeypatch.setitem(sys.modules, "openvino", runtime)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("bertology_serve.export.openvino_ir.save", lambda *_: 0)
    with pytest.raises(Unsupported, match=rf"^{name} is not installed.*pip install 'bertology-serve\[openvino\]'$"):
        save_ir(None, tmp_path / FILE, [{}])


def test_a_file_that_cannot_be_loaded_is_a_failed_verification(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / FILE).write_text("no model")
    with pytest.raises(VerificationError, match=r"^OpenVINO \d+\.\d+\.\d+ cannot load the file: [^\n]+$"):
        OpenVinoSession(tmp_path / FILE)


class Made:
    """An export for OpenVINO and what it was made of."""

    def __init__(self, name: str, directory: Path) -> None:
        pytest.importorskip("openvino")
        pytest.importorskip("nncf")
        family, specs, task, options = CASES[name]
        self.encoder = tiny.encoder(family, directory / "base")
        self.delta = tiny.delta(self.encoder, "mine", specs, task)
        self.spec = ExportSpec(merge=True, target="openvino", **options)
        self.done = self.again(directory / "out")
        self.file = self.done.directory / FILE

    def again(self, out: Path, spec: ExportSpec | None = None, **more) -> exporting.Exported:
        with pytest.MonkeyPatch.context() as patched:
            real = exporting.built_in
            patched.setattr(exporting, "built_in", lambda tokenizer, longest: list(real(tokenizer, longest))[::6])
            patched.setattr(exporting, "CALIBRATED", 9)
            return export_delta(self.encoder, self.delta, out, spec or self.spec, **more)

    def batch(self, *lengths: int) -> Case:
        typed = "token_type_ids" in self.encoder.tokenizer.model_input_names
        return Case(tuple(encodings(lengths, typed, seed=9)), max(lengths) + 2, left=True)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Made:
    return Made("static", tmp_path_factory.mktemp("static"))


def test_it_answers_as_the_engine_does(made):
    """On inputs that the verifier did not see."""
    report, case = made.done.report, made.batch(6, 1, 11)
    assert report.passed
    assert report.runtime.startswith("openvino 20")
    assert report.asked == report.provider == "CPU"
    found = OpenVinoSession(made.file).run(case.arrays(7))
    for row, expected in enumerate(Reference(made.encoder, made.delta).outputs(case.encodings)):
        own = found[row, case.columns(row)] if made.delta.task.per_token else found[row]
        off = np.linalg.norm(own - expected.numpy()) / np.linalg.norm(expected.numpy())
        assert off <= (0.3 if made.spec.max_drift else 1e-5)


def test_it_lies_where_others_look(made):
    files = {path.name for path in made.done.directory.iterdir()}
    assert {FILE, "openvino_model.bin", "config.json", "tokenizer.json", "verification.json"} <= files
    assert ("modules.json" in files) is (made.delta.task.kind == "embedding")
    assert not [name for name in files if "onnx" in name]
    assert made.done.bytes == sum(
        (made.done.directory / f"openvino_model.{end}").stat().st_size for end in ("xml", "bin")
    )


def test_the_example_runs(made, monkeypatch):
    shown = list[list[np.ndarray]]()
    exec(made.done.example, {"print": shown.append})
    assert len(shown[0]) == (2 if made.delta.task.kind == "question-answering" else 1)
    assert all(len(one) == 2 for one in shown[0])


def test_nothing_of_this_machine_is_in_it_and_the_bytes_are_the_same_again(made, tmp_path):
    text = made.file.read_text(encoding="utf-8")
    assert str(made.done.directory.parent) not in text
    assert sys.prefix not in text
    again = made.again(tmp_path / "again").directory
    for end in ("xml", "bin"):
        assert (again / f"openvino_model.{end}").read_bytes() == made.file.with_suffix(f".{end}").read_bytes()


def test_a_row_is_the_same_beside_other_neighbours(made):
    """In batches of one shape to the bit: scales are none of the batch's."""
    session, one, other = OpenVinoSession(made.file), made.batch(6, 11, 3), made.batch(6, 2, 11)
    assert one.encodings[0] == other.encodings[0]
    assert np.array_equal(*(session.run(case.arrays(7))[0] for case in (one, other)))


def test_linears_are_in_8_bits_and_the_words_are_not(static):
    """Each weight is an 8-bit constant; scales are taken from the records that are given."""
    text, encoder = static.file.read_text(encoding="utf-8"), static.encoder
    rows, width = encoder.model.get_input_embeddings().weight.shape
    assert f'element_type="f32" shape="{rows}, {width}"' in text
    assert f'element_type="i8" shape="{rows}, {width}"' not in text
    assert text.count('element_type="i8"') >= 6 * encoder.anatomy.layers


def test_scales_are_those_of_the_given_records(static, tmp_path):
    records = [[one] for one in encodings((9, 5, 7), typed=True)]
    done = static.again(tmp_path / "out", calibrate=records)
    assert (done.directory / FILE).with_suffix(".bin").read_bytes() != static.file.with_suffix(".bin").read_bytes()


def test_what_drifts_too_far_is_not_published(static, tmp_path):
    with pytest.raises(VerificationError, match=r"openvino .*larger --max-drift"):
        static.again(tmp_path / "out", spec=replace(static.spec, max_drift=1e-6))
    assert list(tmp_path.iterdir()) == []


def test_metadata_stays_with_the_file(static):
    facts = json.loads((static.done.directory / "config.json").read_text())["bertology_serve"]
    assert (facts["target"], facts["precision"]) == ("openvino", "int8-static")
    assert facts["delta_sha256"] in static.file.read_text(encoding="utf-8")
