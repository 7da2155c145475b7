"""Files of a report: numbers as they were, null for what is not finite, no PNG where matplotlib is missing."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bertology_serve.analysis import figures
from bertology_serve.analysis.figures import BarChart, Figure, HeatMap, LineChart, Scatter
from bertology_serve.analysis.report import AnalysisReport, _colour, _ticks, render
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


FIGURE = Figure(
    "all <kinds>",
    [
        HeatMap("map", [[0.0, None], [0.25, 1.0]], "layer", "module", "share", (0, 1), column_names=["query", "up"]),
        LineChart("lines", [0, 1, 2], {"a": [0.5, None, 0.75], "b & c": [1, 2, math.nan]}, "x", "y", level=0.6,
              level_name="limit"),
        Scatter("points", [0.0, 1.0], [2.0, 3.0], ["first", "second"], [0, 1], "x", "y"),
        BarChart("bars", ["one", "two"], {"this": [0.5, None], "that": [-0.25, 2.0]}, "share"),
    ],
)  # fmt: skip


class Tips(HTMLParser):
    """Collects what is shown on hovering, and whatever the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tips: list[str] = []
        self.fetched: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.inside == "title":
            self.tips.append(data)
        self.inside = ""


def test_every_number_is_shown_by_hovering() -> None:
    page = Tips()
    page.feed(render("report", {"text": "<script>"}, {"one": FIGURE}))
    assert page.tips == [
        "report",
        "layer 0, query: 0 (share)", "layer 0, up: none (share)",
        "layer 1, query: 0.25 (share)", "layer 1, up: 1 (share)",
        "a, x 0: 0.5", "a, x 2: 0.75", "b & c, x 0: 1", "b & c, x 1: 2",
        "first: cluster 1", "second: cluster 2",
        "one, this: 0.5 (share)", "one, that: -0.25 (share)", "two, that: 2 (share)",
    ]  # fmt: skip
    assert page.fetched == []


def test_names_are_escaped() -> None:
    page = render("report", {"text": "<script>"}, {"one": FIGURE})
    assert "<script" not in page
    assert "all &lt;kinds&gt;" in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 6, [0, 1, 2, 3, 4, 5, 6]), (0.3773, 1.035, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), (2, 2, [2]),
     (-7, 93, [0, 10, 20, 30, 40, 50, 60, 70, 80, 90])],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(ticks)


def test_colours_run_from_end_to_end() -> None:
    assert [_colour(value, 0, 1) for value in (-1, 0, 1, 2, None, math.nan)] == [
        "#440154", "#440154", "#fde725", "#fde725", "#dddddd", "#dddddd",
    ]  # fmt: skip


def test_a_band_reaches_as_far_as_its_spread() -> None:
    lines = LineChart("", [0, 1], {"a": [1.0, 2.0], "b": [1.0, 1.0]}, "x", "y", {"a": [0.5, 0.25]})
    page = render("report", {}, {"one": Figure("f", [lines])})
    points = re.search(r'<polygon points="([^"]*)"', page)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    marks = [float(y) for y in re.findall(r'<circle cx="[^"]*" cy="([^"]*)"', page)[:2]]
    assert len(heights) == 4
    assert marks[0] - heights[0] == pytest.approx(heights[3] - marks[0], abs=0.15)
    assert marks[0] - heights[0] == pytest.approx(2 * (marks[1] - heights[1]), abs=0.3)
    assert page.count("<polygon") == 1


def test_panels_stand_in_rows() -> None:
    lines = LineChart("", [0], {"a": [1.0]}, "x", "y")
    page = render("report", {}, {"one": Figure("f", [lines] * 3, 2)})
    rows = page.split('<div class="row">')[1:]
    assert [row.count("<figure>") for row in rows] == [2, 1]
