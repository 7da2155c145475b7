"""The whole benchmark on a small encoder, with a stand-in for other tools; what it must refuse."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest

from bertology_serve.bench.export import export_batches, export_run
from bertology_serve.bench.export.export_contenders import DENSE, EAGER, FORMS, Model, Tool
from bertology_serve.bench.export.export_report import write
from bertology_serve.bench.export.export_run import Inputs, bare
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.tasks.registry import task_for
from tests import tiny
from tests.export.cases import CLASSES, DELTAS, FOLDS, TAGS, encodings

LENGTHS = (9, 3, 30, 4, 4, 5, 3, 6, 4, 3)
COPIES = Tool("copier", "import shutil, sys; shutil.copytree(sys.argv[3], sys.argv[2])", "", "nothing")


@pytest.fixture
def encoder(tmp_path):
    return tiny.encoder("bert", tmp_path / "base")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(export_run, "FULL", ((2, 16),))
    monkeypatch.setattr(export_run, "EXPORTS", 2)


def test_everything_in_one_run(encoder, small, tmp_path, monkeypatch):
    delta = tiny.delta(encoder, "x", FOLDS, CLASSES)
    task = task_for(CLASSES)
    records = [{"text": "the good cat " * (1 + i % 3), "label": CLASSES.labels[i % 3]} for i in range(9)]
    gold = [task.example(record, f"here:{i}", True) for i, record in enumerate(records)]
    monkeypatch.setattr(export_run, "TOOLS", {"optimum": (COPIES,), "olive": (COPIES,)})
    monkeypatch.setattr(
        export_run, "exported_by", lambda tool, *_: Model(tool.name, _first(encoder, delta, tmp_path), 3)
    )
    said: list[str] = []
    inputs = Inputs(encodings(LENGTHS, True), task, gold, {"optimum": tmp_path}, compiled=False)
    result = export_run.run(encoder, delta, inputs, 2, said.append)
    assert [one.name for one in result.batches] == ["2×16, full", "texts as they come"]
    assert [one.fill for one in result.batches] == [1.0, sum(LENGTHS) / (10 * 30)]
    names = [timed.name for timed in result.times["2×16, full"]]
    assert names == [EAGER, "torch prepacked", *FORMS, "copier", "our torch engine"]
    assert all(len(timed.seconds) == 2 for timed in result.times["texts as they come"])
    assert result.missing == ["copier: no --olive was given"]
    assert result.accuracies[EAGER].agreement == 1.0
    assert result.accuracies[DENSE].largest <= 1e-5
    assert result.accuracies[DENSE].metrics == result.accuracies[EAGER].metrics
    for name, close in result.closenesses.items():
        assert close.worst > 0.99, name
        tipped = 1e-3 if "int8" in name else 1e-6  # where float32's last bit tips a value to the next 8-bit step
        assert (close.neighbours <= tipped) is ("dynamic" not in name), name
    assert all(result.same_bytes.values())
    assert all(seconds > 0 for seconds in result.export_seconds.values())
    assert said[-1].startswith("texts as they come: 10 sequences, fill 0.24, 2 rounds")
    _is_written(result, tmp_path)


def _first(encoder, delta, directory):
    """The dense form, as if another tool had made it."""
    shutil.rmtree(directory / "first", ignore_errors=True)
    return export_run.exported(export_run.ExportInputs.of(encoder, delta, True), directory / "first")[0].logits


def _is_written(result, tmp_path):
    files = write(result, tmp_path / "out")
    assert [path.name for path in files] == ["export.md", "export.csv", "export.png"]
    text = files[0].read_text()
    assert text.count("\n| ours, unpadded, int8-row | ") == 2
    assert "Missing: copier: no --olive was given.\n" in text
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert len(rows) == 2 * 2 * (len(FORMS) + 4)
    assert {row["contender"] for row in rows} == {timed.name for timed in result.times["2×16, full"]}
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_computes_something_else_is_not_timed():
    one = export_batches.Batches("b", ({"attention_mask": np.ones((1, 2), dtype=np.int64)},))
    eager = Model(EAGER, lambda _: np.ones((1, 2), dtype=np.float32))
    for allowed, off, passes in ((1e-5, 1e-6, True), (1e-5, 1e-4, False), (0.3, 0.2, True), (0.3, float("nan"), False)):
        other = Model("other", lambda _, off=off: np.full((1, 2), 1 + off, dtype=np.float32), off=allowed)
        if passes:
            export_run.check([eager, other], one)
        else:
            with pytest.raises(VerificationError, match=r"^other differs from torch eager by .* nothing was timed$"):
                export_run.check([eager, other], one)


def test_what_cannot_be_measured_is_refused(encoder, small):
    inputs = Inputs(encodings(LENGTHS, True), compiled=False)
    with pytest.raises(Unsupported, match="'x' answers token-classification; expected classification or regression"):
        export_run.run(encoder, tiny.delta(encoder, "x", FOLDS, TAGS), inputs, 1)
    with pytest.raises(Unsupported, match="'x' is no checkpoint that others could export; give one that folds"):
        export_run.contenders(encoder, *_with_parts(encoder, "houlsby"), inputs, None)


def _with_parts(encoder, name):
    delta = tiny.delta(encoder, "x", DELTAS[name][0], CLASSES)
    return delta, export_run.ExportInputs.of(encoder, delta, True)


def test_without_a_delta_there_is_a_head_all_the_same(encoder):
    delta = bare(encoder)
    assert delta.kinds == ("probe",)
    assert any(tensor.any() for tensor in delta.head.values())
    assert not delta.effects(encoder.anatomy).low_rank


def test_real_texts_come_in_batches_of_32(encoder):
    found = export_batches.as_they_come(encoder, "t", encodings((3, 9) * 20, True))
    assert [one["input_ids"].shape for one in found.arrays] == [(32, 9), (8, 9)]
    assert (found.tokens, found.sequences) == (240, 40)
    assert found.fill == pytest.approx(2 / 3)
    assert export_batches.full(encoder, 3, 11).fill == 1.0
