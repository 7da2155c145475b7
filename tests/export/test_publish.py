from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.export.export_directory import check_target


def stage(directory: Path, text: str) -> Path:
    (directory / "onnx").mkdir(parents=True)
    (directory / "onnx" / "model.onnx").write_text(text)
    (directory / "verification.json").write_text("{}")
    return directory


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
