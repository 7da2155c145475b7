from __future__ import annotations

import json

import pytest

from bertology_serve.bench.serving import calibrate
from bertology_serve.bench.serving.alternatives import alternatives_run
from bertology_serve.cli.main import main

SMALL = ("--rounds", "1", "--sequences", "12", "--deltas", "2")


@pytest.fixture
def small(monkeypatch):
    """Lengths that the tiny encoder has positions for."""
    from bertology_serve.bench.serving import texts_workload

    monkeypatch.setattr(texts_workload.Workload.__init__, "__defaults__", (64, 8, 10.0, 32, 8, 0))


@pytest.mark.usefixtures("small")
def test_two_tables_and_two_files(encoder, tmp_path, capsys, monkeypatch):
    path, known = tmp_path / "out.json", tmp_path / "known.json"
    monkeypatch.setattr(calibrate, "calibrate", lambda stage, *options: {"backbone": stage.backbone, "x": options})
    files = ["--output", str(path), "--calibration", str(known)]
    assert main(["bench", "serving", "--backbone", encoder.name, *SMALL, "--threads", "1", *files]) == 0
    out, err = capsys.readouterr()
    assert "peft, sorted in 16s" in out
    assert "≥ 8×" in out
    assert "torch" in err
    assert len(json.loads(path.read_text())["contenders"]) == 4
    options = [1.0, ["--engine", "torch"], {"OMP_NUM_THREADS": "1"}]
    assert json.loads(known.read_text()) == {"backbone": encoder.name, "x": options}
    assert f"bertology-serve plan --calibration {known}" in err


@pytest.mark.usefixtures("small")
def test_missed_bars_are_an_error_when_asked(encoder, monkeypatch, capsys):
    from bertology_serve.bench.serving import serving_report

    monkeypatch.setattr(serving_report.Bar, "holds", lambda bar, measured: False)
    assert main(["bench", "serving", "--backbone", encoder.name, *SMALL, "--check"]) == 1
    assert "error: missed: peft as it arrives ÷ ours" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_first(capsys, tmp_path):
    assert main(["bench", "serving", "--backbone", "nowhere", "--output", str(tmp_path / "x.txt")]) == 2
    assert "ends in .json or .csv" in capsys.readouterr().err
    assert main(["bench", "serving", "--backbone", "nowhere", "--calibration", "x.txt"]) == 2
    assert "ends in .json" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch) -> None:
    rows = [
        alternatives_run.Row(key, name, 10.0, 3.5, 20.0, 45.0, 400 << 20, 450 << 20)
        for key, name in alternatives_run.CONTENDERS.items()
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
