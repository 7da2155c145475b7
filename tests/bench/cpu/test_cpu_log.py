from __future__ import annotations

import pytest

from bertology_serve.bench.cpu.contenders import ALONE, DENSE, UNPADDED
from bertology_serve.bench.cpu.cpu_log import TIME, Log, logs
from bertology_serve.errors import SpecError
from tests.bench.cpu.measured import alone


def test_lines_are_on_disk_at_once_and_one_cut_off_is_dropped(tmp_path):
    log = Log(tmp_path / "x" / "log.jsonl")
    log.add(TIME, contender="a", cpu=1.0)
    log.add(TIME, contender="ö", cpu=2.0)
    text = log.path.read_text()
    assert [line["contender"] for line in Log.open(log.path).of(TIME)] == ["a", "ö"]
    log.path.write_text(text + '{"what": "ti')
    assert [line["contender"] for line in Log.open(log.path).lines] == ["a", "ö"]
    assert log.path.read_text() == text
    log.path.write_text("no log\n" + text)
    with pytest.raises(SpecError, match=r"log.jsonl:1 is no JSON; move the file away to begin anew"):
        Log.open(log.path)


def test_what_is_forgotten_is_gone_from_disk(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for name in "ab":
        log.add(TIME, contender=name)
    log.forget(lambda line: line["contender"] == "a")
    assert Log.open(log.path).lines == [{"what": TIME, "contender": "b"}]


def test_ratios_are_taken_within_turns_or_by_way_of_the_baseline(tmp_path):
    log = alone(tmp_path / "log.jsonl", {UNPADDED: 1.0, DENSE: 2.0})
    assert log.ratio(ALONE, "8x128", DENSE, UNPADDED) == 2.0
    assert log.seconds(ALONE, "8x128", UNPADDED) == 2.0  # of 1, 2 and 3
    for turn, cpu in ((7, 10.0), (8, 50.0)):
        log.add(TIME, suite=ALONE, workload="8x128", contender="late", turn=turn, cpu=3 * cpu)
        log.add(TIME, suite=ALONE, workload="8x128", contender=UNPADDED, turn=turn, cpu=cpu)
    assert log.ratio(ALONE, "8x128", "late", UNPADDED) == 3.0
    assert log.ratio(ALONE, "8x128", "late", DENSE) == 1.5
    assert log.ratio(ALONE, "8x128", "never", DENSE) is None
    assert log.ratio(ALONE, "1x16", DENSE, UNPADDED) is None


def test_logs_of_directories_are_found_by_name(tmp_path):
    for name in ("b/y", "a/z", "a/x"):
        Log(tmp_path / f"{name}.jsonl").add(TIME)
    assert [log.path.stem for log in logs([tmp_path / "a", tmp_path / "b"])] == ["x", "z", "y"]


def test_a_baseline_that_was_measured_anew_says_nothing_of_what_was_not(tmp_path):
    log = alone(tmp_path / "log.jsonl", {UNPADDED: 1.0, DENSE: 2.0})
    log.forget(lambda line: line["what"] == TIME and line["contender"] == UNPADDED)
    log.add(TIME, suite=ALONE, workload="8x128", contender=UNPADDED, turn=99, cpu=1.0)
    assert log.ratio(ALONE, "8x128", DENSE, UNPADDED) is None
    assert log.ratio(ALONE, "8x128", UNPADDED, UNPADDED) == 1.0
