from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.publish import check_target, publish


def stage(directory: Path, text: str) -> Path:
    (directory / "onnx").mkdir(parents=True)
    (directory / "onnx" / "model.onnx").write_text(text)
    (directory / "verification.json").write_text("{}")
    return directory


def test_a_directory_is_published_whole(tmp_path):
    publish(stage(tmp_path / ".stage", "new"), tmp_path / "out")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_one_stands_until_the_new_one_does(tmp_path, monkeypatch):
    target = stage(tmp_path / "out", "old")
    fresh = stage(tmp_path / ".stage", "new")
    rename = Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self == fresh:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        publish(fresh, target)
    assert (target / "onnx" / "model.onnx").read_text() == "old"
    monkeypatch.undo()
    publish(fresh, target)
    assert (target / "onnx" / "model.onnx").read_text() == "new"
    assert (fresh / "onnx" / "model.onnx").read_text() == "old"  # for the caller to remove


def test_only_an_export_is_ever_replaced(tmp_path):
    check_target(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=False)
    stage(tmp_path / "export", "x")
    check_target(tmp_path / "export", overwrite=True)
    with pytest.raises(SpecError, match="holds an export already; give --overwrite"):
        check_target(tmp_path / "export", overwrite=False)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    for name in ("work", "file"):
        with pytest.raises(SpecError, match="is no export; give --out a new directory"):
            check_target(tmp_path / name, overwrite=True)
