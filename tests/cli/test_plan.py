from __future__ import annotations

import json

import pytest

from bertology_serve.cli.main import main
from bertology_serve.scale import planner as planning

TRAFFIC = ["--deltas", "50", "--calls", "300"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "LEAST", 2000)
    path = tmp_path / "here.json"
    path.write_text('{"ladder": [[10, 100, 0.004], [1000, 10000, 0.103]], "load_seconds": 0.01, "rank_bytes": 1000}')
    return ["plan", "--calibration", str(path)]


def test_a_plan(measured, tmp_path, capsys):
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ["--ranks", "4,8", "--p99-ms", "60", "--replica-cost", "2", "--output", str(out), "--plot", str(png)]
    assert main([*measured, *TRAFFIC, *options]) == 0
    shown = capsys.readouterr()
    found = json.loads(out.read_text())
    count = found["plan"]["replicas"]
    assert "50 deltas, 300 calls/s" in shown.out
    assert f"{count} replica" in shown.err
    assert f"{2 * count} an hour" in shown.err
    assert found["traffic"]["ranks"] == [4, 8]
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ["--deltas", "5"],
        [*TRAFFIC, "--tokens", "10"],
        [*TRAFFIC, "--p99-ms", "1"],
        [*TRAFFIC, "--output", "x.csv"],
        [*TRAFFIC, "--plot", "x.pdf"],
    ],
)
def test_what_cannot_be_planned_is_one_line(options, measured, capsys):
    assert main([*measured, *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
