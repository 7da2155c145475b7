from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertology_serve.errors import Unsupported
from bertology_serve.training import run_plots


def test_stages_stand_one_after_the_other():
    lines = [{"stage": 1, "step": 1}, {"stage": 1, "step": 2}, {"stage": 2, "step": 1}, {"stage": 2, "step": 3}]
    assert run_plots._places(lines) == ([1, 2, 3, 5], [2])
    assert run_plots._places([{"step": 1}, {"step": 2}]) == ([1, 2], [])


def test_points_are_those_that_have_a_value():
    lines = [{"loss": 2.0}, {"eval": {"accuracy": 0.5}}, {"loss": 1.0}]
    assert run_plots._points(lines, [1, 1, 2], lambda line: line.get("loss")) == ([1, 2], [2.0, 1.0])


def test_curve_is_a_picture_beside_the_log(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    lines.append({"step": 8, "eval": {"accuracy": 0.9}})  # type: ignore[dict-item]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run_plots.draw_curve(tmp_path, "accuracy")
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    lines[3]["loss"] = 9.0
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_plots.draw_curve(tmp_path, "accuracy").read_bytes() != first, "the loss is in it"


def test_missing_matplotlib_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_plots, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"--plot needs matplotlib, which is not installed; take the extra"):
        run_plots.check_plots()
