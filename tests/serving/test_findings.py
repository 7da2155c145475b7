from __future__ import annotations

import json
import os
import time

import pytest

from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.engine import Engine
from bertology_serve.serving.findings import Findings, circumstances, keep, recall
from bertology_serve.serving.metrics import Metrics
from bertology_serve.serving.settling import Setting

LADDER = ((100, 1000, 0.012), (1100, 11_000, 0.112))
FOUND = Findings(Setting("onnx", prepack=True, found=True), ((32, 500, 0.004), (64, 1000, 0.0061)))


@pytest.fixture
def where(pipeline):
    return circumstances(pipeline, Setting(), ServerConfig(), "cpu")


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep(where, FOUND)
    assert list((tmp_path / "bertology-serve" / "findings").glob("*.json"))
    assert recall(where) == FOUND


def test_a_ladder_that_is_known_is_not_timed(pipeline, monkeypatch):
    monkeypatch.setattr("bertology_serve.serving.engine.climb", lambda *_: pytest.fail("timed again"))
    engine = Engine(pipeline, ServerConfig(max_batch_ms=10), Metrics())
    assert engine.warm_up(LADDER) == list(LADDER)
    assert engine.queue.times.budget == pytest.approx(80, abs=1)
