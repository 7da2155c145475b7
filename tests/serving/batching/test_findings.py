from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest

from bertology_serve.serving.batching import warmup
from bertology_serve.serving.batching.queue import BatchTimes
from bertology_serve.serving.batching.warmup import Findings, circumstances, find, find_again, keep, recall
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.execution.engine_choice import EngineConfig

LADDER = ((100, 1000, 0.012), (1100, 11_000, 0.112))
FOUND = Findings(EngineConfig("onnx", prepack=True, found=True), ((32, 500, 0.004), (64, 1000, 0.0061)))


@pytest.fixture
def where(pipeline):
    return circumstances(pipeline, EngineConfig(), ServerConfig(), "cpu")


def test_what_was_kept_is_recalled(where, tmp_path):
    assert recall(where, tmp_path) is None
    keep(where, FOUND, tmp_path / "new")
    assert recall(where, tmp_path / "new") == FOUND
    assert recall(json.loads(json.dumps(where)), tmp_path / "new") == FOUND


@pytest.mark.parametrize("name", ["cpu", "threads", "versions", "weights", "dtype", "device", "setting", "batch"])
def test_in_other_circumstances_it_is_not(name, where, tmp_path):
    keep(where, FOUND, tmp_path)
    assert recall({**where, name: "other"}, tmp_path) is None


def test_nor_when_it_is_old(where, tmp_path):
    keep(where, FOUND, tmp_path)
    old = time.time() - 8 * 86_400
    os.utime(next(tmp_path.iterdir()), (old, old))
    assert recall(where, tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff",
        b'{"setting": {}, "ladder": []}',
        b'{"setting": {"engine": "tensorflow"}, "ladder": [[1, 1, 1]]}',
        b'{"setting": {}, "ladder": [[32, 500, -1.0]]}',
        b'{"setting": {}, "ladder": [[32, 1.0]]}',
    ],
)
def test_nor_when_it_makes_no_sense(content, where, tmp_path):
    keep(where, FOUND, tmp_path)
    next(tmp_path.iterdir()).write_bytes(content)
    assert recall(where, tmp_path) is None


def test_where_nothing_can_be_kept_nothing_is(where, tmp_path):
    file = tmp_path / "file"
    file.touch()
    keep(where, FOUND, file / "below")
    assert recall(where, file / "below") is None


def test_in_the_users_cache(where, tmp_path, monkeypatch):
    keep(where, FOUND)  # BERTOLOGY_CACHE is empty in tests: nothing is kept
    assert recall(where) is None
    monkeypatch.delenv("BERTOLOGY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep(where, FOUND)
    assert list((tmp_path / "bertology-serve" / "findings").glob("*.json"))
    assert recall(where) == FOUND
    monkeypatch.setattr("bertology_serve.files.os.geteuid", lambda: os.getuid() + 1)  # another user's
    assert recall(where) is None
    assert recall(where, tmp_path / "bertology-serve" / "findings") is None


def test_a_ladder_that_is_known_is_not_timed(pipeline, monkeypatch):
    monkeypatch.setattr("bertology_serve.serving.batching.warmup.climb", lambda *_: pytest.fail("timed again"))
    times = BatchTimes(0.010, 8192)
    assert warmup.warm_up(pipeline, times, LADDER) == list(LADDER)
    assert times.budget == pytest.approx(80, abs=1)


QUIET = [(24, 500, 0.004), (72, 1500, 0.008), (120, 2500, 0.013), (240, 60_000, 0.040)]


class Machine:
    """A server that starts: ``ladder`` is what it finds, ``again`` what a second look at it does; ``load`` beside."""

    def __init__(self, monkeypatch: Any, ladder: list[Any], again: list[Any], load: float = 0.5) -> None:
        self.settled: list[EngineConfig] = []
        self.started: list[Any] = []
        self.ladder, self.pipeline = ladder, SimpleNamespace(encoder=SimpleNamespace(lock=RLock()))
        self.times = SimpleNamespace(cap=0.05)
        monkeypatch.setattr(warmup, "warm_up", self.warm_up)
        monkeypatch.setattr(warmup, "climb", lambda pipeline, cap, most: again)
        monkeypatch.setattr(warmup.os, "getloadavg", lambda: (load, 0.0, 0.0))
        monkeypatch.setattr(warmup.os, "cpu_count", lambda: 2)

    def settle(self, setting: EngineConfig) -> tuple[str, EngineConfig]:
        self.settled.append(setting)
        return setting.engine if setting.found else "torch", replace(setting, engine="torch", found=True)

    def warm_up(self, pipeline: Any, times: Any, known: Any = ()) -> list[Any]:
        self.started.append(list(known) or self.ladder)
        return self.started[-1]


def starts(machine: Any, known: Findings | None, monkeypatch: Any) -> tuple[str, Findings | None]:
    """Which engine a start takes, and what it keeps."""
    kept: list[Findings] = []
    monkeypatch.setattr(warmup, "keep", lambda where, found: kept.append(found))
    name, sure = find(machine, machine.times, EngineConfig(), {}, known)
    assert sure == (known is not None or bool(kept))
    return name, kept[0] if kept else None


def slowed(ladder: list[Any], times: float) -> list[Any]:
    return [(tokens, squares, times * seconds) for tokens, squares, seconds in ladder]


def test_what_a_quiet_machine_gives_is_kept(monkeypatch):
    machine = Machine(monkeypatch, QUIET, slowed(QUIET[:3], 0.8))
    kept = Findings(EngineConfig("torch", found=True), tuple(QUIET))
    assert starts(machine, None, monkeypatch) == ("torch", kept)


@pytest.mark.parametrize(
    ("ladder", "again", "load", "why"),
    [
        ([(24, 500, 0.307), *QUIET[1:]], QUIET[:3], 0.5, "24 tokens took 307.0 ms, 72 took 8.0 ms"),
        (slowed(QUIET, 3), QUIET[:3], 0.5, "batches took 3.0 times as long as a second time"),
        (QUIET, slowed(QUIET[:3], 4), 0.5, "batches took 0.2 times as long as a second time"),
        (QUIET, QUIET[:3], 12.7, "load 12.7 on 2 processors"),
    ],
)
def test_what_a_busy_machine_gives_is_not(ladder, again, load, why, monkeypatch, caplog):
    machine = Machine(monkeypatch, ladder, again, load)
    assert starts(machine, None, monkeypatch) == ("torch", None)
    assert f"the machine seems busy ({why}): timings are not kept" in caplog.text


@pytest.mark.parametrize("times", [0.3, 1.0, 1.2])
def test_what_is_known_counts_though_the_machine_is_busy_now(times, monkeypatch):
    known = Findings(FOUND.setting, tuple(slowed(QUIET, times)))
    machine = Machine(monkeypatch, QUIET, QUIET[:3], 12.7)
    assert starts(machine, known, monkeypatch) == ("onnx", None)
    assert machine.settled == [FOUND.setting]
    assert machine.started == [list(known.ladder)]


@pytest.mark.parametrize("ladder", [slowed(QUIET, 38), [(1, 1, 0.1)]])
def test_what_was_found_on_a_busy_machine_is_found_anew(ladder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    machine = Machine(monkeypatch, QUIET, QUIET[:3])
    name, kept = starts(machine, Findings(FOUND.setting, tuple(ladder)), monkeypatch)
    assert (name, kept) == ("torch", Findings(EngineConfig("torch", found=True), tuple(QUIET)))
    assert machine.settled == [FOUND.setting, EngineConfig()], "the engine is chosen anew too"
    assert machine.started[-1] == QUIET
    assert "are timed again" in caplog.text


class Looks:
    """An event that is set after so many looks; before each the load becomes the next of ``loads``."""

    def __init__(self, monkeypatch: Any, loads: list[float]) -> None:
        self._loads: Iterator[float] = iter(loads)
        self._load = 0.0
        monkeypatch.setattr(warmup.os, "getloadavg", lambda: (self._load, 0.0, 0.0))

    def wait(self, seconds: float) -> bool:
        self._load = next(self._loads, -1.0)
        return self._load < 0


@pytest.mark.parametrize(
    ("loads", "items", "settled"),
    [
        ([0.2, 0.2], [0], 1),  # once is enough
        ([9.0, 1.1, 0.9, 0.2], [0], 1),
        ([9.0, 9.0], [0], 0),
        ([0.2, 0.2, 0.2], [4, 1, 0], 1),  # calls come first
        ([0.2], [3], 0),
    ],
)
def test_a_doubtful_choice_is_made_again_when_the_machine_is_idle(loads, items, settled, monkeypatch):
    machine = Machine(monkeypatch, QUIET, QUIET[:3])
    kept: list[Any] = []
    monkeypatch.setattr(warmup, "keep", lambda where, found: kept.append(found))
    left = iter([*items, *[items[-1]] * len(loads)])
    find_again(machine, machine.times, EngineConfig(), {}, lambda: next(left), Looks(monkeypatch, loads))
    assert (len(machine.settled), len(kept)) == (settled, settled)


def test_until_it_may_be_relied_on(monkeypatch):
    machine = Machine(monkeypatch, slowed(QUIET, 3), QUIET[:3])
    looks = Looks(monkeypatch, [0.2, 0.2, 0.2])
    find_again(machine, machine.times, EngineConfig(), {}, lambda: 0, looks)
    assert len(machine.settled) == 3
