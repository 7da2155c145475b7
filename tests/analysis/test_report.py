"""Files of a report: numbers as they were, null for what is not finite, no PNG where matplotlib is missing."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from bertology_serve.analysis import figures
from bertology_serve.analysis.figures import BarChart, Figure, HeatMap, LineChart, Scatter
from bertology_serve.analysis.report import AnalysisReport
from bertology_serve.errors import FormatError, NotFound

REPORT = AnalysisReport(
    "trial",
    {"share": math.nan, "names": ("a", "b")},
    {"rows": [{"a": 0.1 + 0.2, "b": None}, {"a": 2, "c": "x,y"}]},
    {
        "lines": Figure(
            "lines", [LineChart("", [0, 1], {"a": [1, math.inf]}, "x", "y", {"a": [0.1, 0.1]}, 0.5, "half")]
        ),
        "maps": Figure("maps", [HeatMap("", [[1.0, None]], "r", "c", "unit", row_names=["one"])] * 3, 2),
    },
)


def test_files(tmp_path: Path) -> None:
    paths = REPORT.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        "trial.json", "trial.html", "trial-rows.csv", "trial-lines.png", "trial-maps.png",
    ]  # fmt: skip
    held = json.loads(paths[0].read_text())
    assert held["facts"] == {"share": None, "names": ["a", "b"]}
    assert held["tables"]["rows"][0]["a"] == 0.1 + 0.2
    assert held["figures"]["lines"]["panels"][0]["curves"] == {"a": [1, None]}
    assert held["figures"]["maps"]["panels"][0]["kind"] == "HeatMap"
    rows = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert rows == [{"a": "0.30000000000000004", "b": "", "c": ""}, {"a": "2", "b": "", "c": "x,y"}]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[3:])


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    assert [path.suffix for path in REPORT.save(tmp_path)] == [".json", ".html", ".csv"]


def test_everything_is_made_again_from_the_json(tmp_path: Path) -> None:
    """Tables, page and plots: nothing is in a figure that is not in the JSON."""
    whole = {**REPORT.figures, "more": Figure("more", [
        BarChart("", ["a", "b"], {"one": [0.1, None]}, "unit"),
        Scatter("", [0.0, 1.0], [1.0, 2.0], ["p", "q"], [0, 1], "x", "y"),
    ])}  # fmt: skip
    first = AnalysisReport("trial", {"share": 0.5}, REPORT.tables, whole).save(tmp_path / "first")
    again = AnalysisReport.load(first[0]).save(tmp_path / "again")
    assert [path.name for path in again] == [path.name for path in first]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_what_is_no_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="give the JSON"):
        AnalysisReport.load(tmp_path / "none.json")
    for text in ("{", "[]", '{"analysis": "x"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(FormatError, match="no report's JSON"):
            AnalysisReport.load(tmp_path / "a.json")
