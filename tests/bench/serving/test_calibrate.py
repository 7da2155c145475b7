from __future__ import annotations

import asyncio
from itertools import pairwise

import msgspec
import pytest

from bertology_serve.bench.serving import calibrate
from bertology_serve.bench.serving.calibrate import BatchSums
from bertology_serve.scale.simulation import ReplicaCosts
from tests.bench.prove.test_figures import stage  # noqa: F401 - fixture: servers of this process
from tests.serving.conftest import encoder  # noqa: F401 - fixture


def test_a_server_is_timed_as_plan_reads_it(stage, monkeypatch):  # noqa: F811
    monkeypatch.setattr(calibrate, "LENGTHS", (6, 22))
    monkeypatch.setattr(calibrate, "CLIENTS", (1, 4))
    monkeypatch.setattr(calibrate, "find_spec", lambda name: None)  # the router would be a process of its own
    found = msgspec.convert(calibrate.calibrate(stage, 0.1), ReplicaCosts)
    assert found.backbone == stage.backbone
    assert [len(sample) for sample in found.ladder] == [3] * 4
    assert all(min(sample) > 0 for sample in found.ladder)
    alone, several = found.ladder[:2]
    assert several[0] >= alone[0]
    assert (found.rank_bytes > 0, found.delta_bytes > 0, found.load_seconds >= 0) == (True, True, True)
    sizes = [stage.random("x", calibrate.Lora(rank=rank), calibrate.ZOO["mood"][1], 0).bytes for rank in (1, 5, 9)]
    assert [more - less for less, more in pairwise(sizes)] == [4 * found.rank_bytes] * 2
    assert sizes[0] == found.delta_bytes + found.rank_bytes


def test_the_batch_in_the_middle():
    assert BatchSums(seconds=2.0, batches=4, tokens=80, items=8).sample == (20, 2 * 100, 0.5)


def test_a_longer_way_takes_longer(monkeypatch):
    async def closed(url, ask, clients, seconds, outcomes):
        outcomes.answered.append({"near": 0.010, "far": 0.013}[url])

    monkeypatch.setattr(calibrate, "closed", closed)
    assert asyncio.run(calibrate.further("near", "far", 0.0)) == pytest.approx(0.003)
    assert asyncio.run(calibrate.further("far", "near", 0.0)) == 0.0
