from __future__ import annotations

import csv
import json

import pytest

from bertology_serve.bench.serving.serving_report import BARS, Bar, as_dict, check_suffix, judge, write
from bertology_serve.bench.serving.texts_workload import Workload
from bertology_serve.bench.timing import Timed
from bertology_serve.errors import SpecError
from bertology_serve.export.installation import environment

OURS, NONE = Timed("ours", (1.0, 1.0), (1.0, 1.0)), Timed("ours, no delta", (0.9, 0.8), (1.0, 1.0))
PEFT = Timed("peft, as it arrives", (9.0, 9.0), (4.0, 4.0))


def test_bars():
    least, most = Bar("x", "a", "b", least=8.0), Bar("x", "a", "b", most=1.1)
    assert (least.promise, least.holds(8.0), least.holds(7.9)) == ("≥ 8×", True, False)
    assert (most.promise, most.holds(1.1), most.holds(1.11)) == ("≤ 1.10×", True, False)
    assert [bar.promise for bar in BARS] == ["≥ 8×", "≥ 3×", "≤ 1.10×"]


def test_judging():
    arrives, sixteens, overhead = judge([OURS, NONE, PEFT])
    assert (arrives.verdict, arrives.measured, arrives.cpu) == ("holds", 9.0, 4.0)
    assert (sixteens.verdict, sixteens.measured) == ("not run", None)
    assert overhead.verdict == "missed"


def test_files_hold_what_was_measured_where_and_when(tmp_path):
    times = [OURS, PEFT]
    result = as_dict(Workload(), "tiny", 1536, times, judge(times), environment())
    write(result, tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["environment"].keys() >= {"date", "cpu", "cores", "threads", "versions"}
    assert read["bars"][0]["verdict"] == "holds"
    assert read["contenders"][1]["rounds_ms"] == [9000.0, 9000.0]
    write(result, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["contender"], row["round"], row["ms"], row["cpu_ms"]) for row in rows[2:]] == [
        ("peft, as it arrives", "0", "9000.000", "4000.000"),
        ("peft, as it arrives", "1", "9000.000", "4000.000"),
    ]


def test_other_endings_are_refused(tmp_path):
    check_suffix(None)
    with pytest.raises(SpecError, match=r"ends in .json or .csv"):
        check_suffix(tmp_path / "a.txt")
