from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertology_serve.errors import Unsupported
from bertology_serve.training import plots
from tests.training.grids import made


def test_stages_stand_one_after_the_other():
    lines = [{"stage": 1, "step": 1}, {"stage": 1, "step": 2}, {"stage": 2, "step": 1}, {"stage": 2, "step": 3}]
    assert plots._places(lines) == ([1, 2, 3, 5], [2])
    assert plots._places([{"step": 1}, {"step": 2}]) == ([1, 2], [])


def test_points_are_those_that_have_a_value():
    lines = [{"loss": 2.0}, {"eval": {"accuracy": 0.5}}, {"loss": 1.0}]
    assert plots._points(lines, [1, 1, 2], lambda line: line.get("loss")) == ([1, 2], [2.0, 1.0])


def test_curve_is_a_picture_beside_the_log(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    lines.append({"step": 8, "eval": {"accuracy": 0.9}})  # type: ignore[dict-item]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plots.draw_curve(tmp_path, "accuracy")
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    first = path.read_bytes()
    lines[3]["loss"] = 9.0
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plots.draw_curve(tmp_path, "accuracy").read_bytes() != first, "the loss is in it"


def test_missing_matplotlib_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"--plot needs matplotlib, which is not installed; take the extra"):
        plots.check_plots()


pytest.importorskip("matplotlib", reason="the plots extra is not installed")

FOUND = {
    f"mood/lora-rank-{rank}/seed-{seed}": made.result(0.5 + rank / 10 + seed / 50, 0.4)
    for rank in made.RANKS
    for seed in (0, 1)
}


def log(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps({"step": 1, **line}) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_metric_over_an_axis_is_drawn_with_its_points(tmp_path: Path):
    results = made.results(made.grid(), FOUND)
    (name, points), = plots._lines(results, "rank", results.columns[0])  # fmt: skip
    assert name == "LoRA"
    assert [point[:2] for point in points] == [(1, pytest.approx(61.0)), (4, pytest.approx(91.0))]
    assert plots.draw_axes(results, tmp_path) == [tmp_path / "over-rank.png"]
    assert plots.draw_parameters(results, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_words_are_no_axis(tmp_path: Path):
    grid = made.grid().only([], ["ft"])
    assert plots.draw_axes(made.results(grid, {}), tmp_path) == []


def test_curves_are_of_the_last_stage_and_mean_over_seeds(tmp_path: Path):
    norms = {"embeddings": 1.0, "0": 2.0, "head": 3.0, "delta": 9.0}
    first = log(tmp_path / "a", {"stage": 1, "layer_norms": {"delta": 5.0}}, {"stage": 2, "layer_norms": norms})
    second = log(tmp_path / "b", {"stage": 2, "layer_norms": {**norms, "0": 4.0}}, {"stage": 2, "loss": 1.0})
    assert plots.layer_curves([first, second]) == {"embeddings": [1.0], "0": [3.0], "head": [3.0]}
    assert plots.layer_curves([log(tmp_path / "c", {"loss": 1.0})]) == {}
    logs = {("FT", "Mood"): [first]}
    assert plots.draw_gradients(made.results(made.grid(), {}), logs, tmp_path) == [tmp_path / "gradients-mood.png"]


def test_places_stand_from_below():
    assert sorted(["head", "10", "2", "rest", "embeddings"], key=plots._order) == [
        "embeddings",
        "2",
        "10",
        "rest",
        "head",
    ]
