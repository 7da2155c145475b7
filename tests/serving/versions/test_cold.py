"""Calls for cold deltas through a running server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.conftest import DELTAS, RECORDS
from tests.serving.running import Running, running, wait

INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the cat"]}]}


@pytest.fixture
def registry(encoder, deltas) -> Registry:
    made = Registry(Pipeline(encoder), device_bytes=11_000, host_bytes=0)
    made.load(deltas)
    return made


@pytest.fixture
def cold(registry) -> Iterator[Running]:
    with running(registry.pipeline, registry=registry) as server:
        yield server


def test_every_route_wakes_what_it_asks(cold, registry):
    assert len(registry.pipeline.deltas) < len(DELTAS) + 1
    for name, record in RECORDS.items():
        answer = cold.post("/predict", {"delta": name, **record})
        assert answer.status_code == 200, answer.text
    for path, body in (
        ("/models/mood", {"inputs": "the cat"}),
        ("/v2/models/sense/infer", INFER),
        ("/v1/embeddings", {"model": "raw", "input": "a"}),
        ("/tei/grade/rerank", {"query": "a", "texts": ["b"]}),
    ):
        assert cold.post(path, body).status_code == 200
    listed = {model["name"]: model for model in cold.client.get("/models").json()}
    assert listed.keys() == {"base", *DELTAS}
    assert listed["mood"]["kinds"] == ["lora"]
    page = cold.client.get("/metrics").text
    assert 'bertology_tier_deltas{tier="device"}' in page
    assert float(next(line for line in page.splitlines() if line.startswith("bertology_delta_loads_total")).split()[1])


def test_one_call_for_more_than_fits_is_answered_or_told(cold):
    items = [{"delta": name, **record} for name, record in RECORDS.items()]
    answer = cold.post("/predict", items)
    assert answer.status_code in (200, 503), answer.text


class Slow:
    """Reads of one registry that wait until they are let go."""

    def __init__(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.reading, read = threading.Event(), threading.Event(), registry._read

        def slow(path: Path, name: str) -> Any:
            self.reading.set()
            assert self.go.wait(20)
            return read(path, name)

        monkeypatch.setattr(registry, "_read", slow)


def test_hot_calls_do_not_wait_for_cold_ones(cold, registry, monkeypatch):
    (hot, *_), (chilly, *_) = (
        sorted(registry.pipeline.deltas.keys() - {"base"}),
        sorted(DELTAS.keys() - registry.pipeline.deltas.keys()),
    )
    slow = Slow(registry, monkeypatch)
    found: list[httpx.Response] = []
    body = {"delta": chilly, **RECORDS[chilly]}
    threads = [threading.Thread(target=lambda: found.append(cold.post("/predict", body))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert slow.reading.wait(20)
    assert cold.post("/predict", {"delta": hot, **RECORDS[hot]}).status_code == 200
    assert registry.tiers.tier(chilly).value == "loading"
    page = cold.client.get("/metrics").text
    assert f'waiting_lora_adapters="{chilly}"' in page
    late = cold.client.post("/predict", json=body, headers={"X-Request-Timeout-Ms": "30"})
    assert (late.status_code, "was not loaded within 0.03 s" in late.text) == (504, True)
    slow.go.set()
    for thread in threads:
        thread.join(120)
    assert [response.status_code for response in found] == [200] * 3


def test_too_many_calls_for_cold_deltas_are_told_to_come_back(registry, monkeypatch):
    chilly = sorted(DELTAS.keys() - registry.pipeline.deltas.keys())[0]
    slow = Slow(registry, monkeypatch)
    with running(registry.pipeline, registry=registry, max_cold_calls=1) as server:
        body = {"delta": chilly, **RECORDS[chilly]}
        first = threading.Thread(target=server.post, args=("/predict", body))
        first.start()
        assert slow.reading.wait(20)
        wait(lambda: server.server.service.lifecycle.waiting_calls == 1)
        refused = server.post("/predict", body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        slow.go.set()
        first.join(120)


def test_a_torn_delta_is_told_and_spoils_nothing(cold, registry, deltas, monkeypatch):
    chilly = sorted(DELTAS.keys() - registry.pipeline.deltas.keys())[0]
    read = registry._read
    monkeypatch.setattr(registry, "_read", lambda path, name: read(deltas / "nowhere", name))
    assert cold.post("/predict", {"delta": chilly, **RECORDS[chilly]}).status_code == 404
    assert cold.post("/predict", {"delta": "base", "text": "a"}).status_code == 200


def test_a_delta_that_leaves_between_look_up_and_queue_answers_nevertheless(cold, registry, monkeypatch):
    hot = sorted(registry.pipeline.deltas.keys() - {"base"})[0]
    tokenise = registry.pipeline.tokenise

    def evicted_first(job: Any) -> None:
        registry.pipeline.evict(hot)
        tokenise(job)

    monkeypatch.setattr(registry.pipeline, "tokenise", evicted_first)
    assert cold.post("/predict", {"delta": hot, **RECORDS[hot]}).status_code == 200
    assert cold.post("/models/" + hot, {"inputs": RECORDS[hot]}).status_code == 200
