from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bertology_serve.bench.export import export_contenders
from bertology_serve.bench.export.export_contenders import TOOLS, Model, Tool, exported_by
from bertology_serve.errors import Unsupported


def environment(directory: Path) -> Path:
    """A virtual environment whose Python is this one."""
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").symlink_to(sys.executable)
    return directory


def made(script: str, tmp_path: Path) -> Model:
    return exported_by(Tool("t", script, "9", "t==1"), environment(tmp_path / "env"), tmp_path / "c", tmp_path / "out")


def test_the_file_is_loaded_from_where_the_tool_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_contenders, "in_file", lambda name, path: (name, path.read_text()))
    script = "import sys, pathlib as l; p = l.Path(sys.argv[2]); p.mkdir(); (p / 'model.onnx').write_text(sys.argv[3])"
    assert made(script, tmp_path) == ("t", "9")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise ValueError('no luck')", "ValueError: no luck"),
        ("pass", "no model.onnx"),
    ],
)  # fmt: skip
def test_a_tool_that_fails_is_named_in_one_line(script, said, tmp_path):
    with pytest.raises(Unsupported) as problem:
        made(script, tmp_path)
    assert str(problem.value) == f"t could not export the checkpoint: {said}; in its environment: t==1"


def test_a_tool_that_hangs_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(export_contenders, "SECONDS", 0.5)
    with pytest.raises(Unsupported, match=r"^t took more than 0.5 s to export; leave it out$"):
        made("import time; time.sleep(60)", tmp_path)


@pytest.mark.parametrize("tool", [tool for tools in TOOLS.values() for tool in tools], ids=lambda tool: tool.name)
def test_how_to_install_one_is_said(tool, tmp_path):
    compile(tool.script, tool.name, "exec")
    with pytest.raises(Unsupported, match=r"no virtual environment for .*; make one: python -m venv .* install torch "):
        exported_by(tool, tmp_path / "none", tmp_path, tmp_path / "out")
