from __future__ import annotations

import json

import pytest

from bertology_serve.bench.serving.alternatives import alternatives_run
from bertology_serve.cli.main import main


@pytest.fixture
def measured(monkeypatch) -> None:
    rows = [
        alternatives_run.Row(name, 10.0, 3.5, 20.0, 45.0, 400 << 20, 450 << 20)
        for name in alternatives_run.NAMES.values()
    ]
    monkeypatch.setattr(
        alternatives_run, "compare", lambda stage, plan, advance: alternatives_run.Compared(rows, 5.0, False)
    )


def test_a_table_a_file_and_a_plot(measured, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    options = ["--tasks", "2", "--many", "4", "--rounds", "1", "--output", str(out), "--plot", str(plot)]
    assert main(["bench", "alternatives", *options]) == 0
    shown, err = capsys.readouterr()
    assert "p50 ms" in shown
    assert "450" in shown
    assert "one core only" in err
    assert json.loads(out.read_text())["rows"][0]["texts_s"] == 10.0
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "x.txt"), "ends in .json"),
        (("--plot", "x.gif"), "ends in .png"),
        (("--tasks", "9", "--many", "8"), "tasks is 9"),
    ],
)
def test_bad_options(measured, options, message, capsys):
    assert main(["bench", "alternatives", *options]) == 2
    assert message in capsys.readouterr().err
