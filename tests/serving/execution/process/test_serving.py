"""A server whose executor is another process, over a real socket."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bertology_serve.bench.prove.isolation import apart, numbers_of
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.conftest import DELTAS, RECORDS, save_version
from tests.serving.execution.process.test_remote import kill
from tests.serving.running import Running, running, wait

ITEMS = [{"delta": name, "logits": True, **record} for name, record in RECORDS.items()]


@pytest.fixture(scope="module")
def served(remote, far, deltas) -> Iterator[Running]:
    with running(remote, registry=far) as started:
        yield started


@pytest.fixture(scope="module")
def expected(server) -> list:
    return server.post("/predict", ITEMS).json()


def same(found: list, expected: list) -> bool:
    """Whether these are the answers, up to what the rest of a batch does to the last bits."""
    return [item["delta"] for item in found] == [item["delta"] for item in expected] and all(
        apart(numbers_of(one), numbers_of(other)) < 1e-5 for one, other in zip(found, expected, strict=True)
    )


def test_the_same_answers_over_http(served, expected):
    assert same(served.post("/predict", ITEMS).json(), expected)


def test_killed_again_and_again_under_load(served, remote, expected):
    """Every call has one answer, its own; none hears of the executor's end."""
    answers: list[list] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(served.post("/predict", ITEMS).json())

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        restarts, count = remote.restarts, len(answers)
        kill(remote)
        wait(lambda before=restarts: remote.restarts > before)
        wait(lambda before=count: len(answers) > before + 3)
    done.set()
    for thread in threads:
        thread.join(120)
    assert all(same(answer, expected) for answer in answers)
    text = served.client.get("/metrics").text
    assert f"bertology_executor_restarts_total {remote.restarts}.0" in text
    assert "bertology_executor_up 1.0" in text


def test_not_ready_while_there_is_no_executor_and_what_comes_waits(served, remote, expected):
    nursery = remote.supervisors[0]._nursery._process.pid
    os.kill(nursery, signal.SIGSTOP)  # no other one comes
    try:
        kill(remote)
        wait(lambda: served.client.get("/v2/health/ready").status_code == 503)
        assert served.client.get("/health").json() == {"status": "restarting"}
        assert "bertology_ready 0.0" in served.client.get("/metrics").text
        found: list = []
        thread = threading.Thread(target=lambda: found.append(served.post("/predict", ITEMS)))
        thread.start()
        wait(lambda: served.server.service.queue.items == 0)
    finally:
        with suppress(ProcessLookupError):  # on a slow machine it has been given up, and another one stands in for it
            os.kill(nursery, signal.SIGCONT)
    thread.join(120)
    assert same(found[0].json(), expected)
    wait(lambda: served.client.get("/v2/health/ready").status_code == 200)


def test_poison(served, remote, encoder, tmp_path, expected, monkeypatch):
    """A delta on whose batches the executor ends is set aside; the others that were in them are answered."""
    outputs = remote.outputs

    def poisoned(owned):
        if any(ready.delta.name == "mood" for ready, _ in owned):
            remote.supervisors[0].line().kill()
        return outputs(owned)

    monkeypatch.setattr(served.server.service._executor.quarantine, "_clock", lambda: 0.0)  # set aside until the end
    with monkeypatch.context() as patch:
        patch.setattr(remote, "outputs", poisoned)
        loop = asyncio.run(_ask_together(served.url))
    statuses = dict(zip(RECORDS, [answer[0] for answer in loop], strict=True))
    assert statuses.pop("mood") == 503
    assert set(statuses.values()) == {200}
    told = loop[list(RECORDS).index("mood")]
    assert "ended twice on delta 'mood', version '1'" in told[1]["error"]
    assert int(told[2]) == 10
    assert served.post("/predict", ITEMS[:1]).status_code == 503
    registry = Registry(remote, tmp_path)
    save_version(encoder, tmp_path, "mood", "2", list(DELTAS).index("mood"))
    before = remote._ready["mood"]
    registry.put("mood")
    assert same(served.post("/predict", ITEMS[:1]).json(), expected[:1])
    remote._ready["mood"] = before
    monkeypatch.setattr(served.server.service._executor.quarantine, "_until", {})


async def _ask_together(url: str) -> list[tuple]:
    """All at once, so that they share a batch or two."""
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        replies = await asyncio.gather(*(client.post("/predict", json=item) for item in ITEMS))
    return [(reply.status_code, reply.json(), reply.headers.get("retry-after")) for reply in replies]


def test_no_shared_memory_has_a_name(served):
    assert not [path for path in Path("/dev/shm").iterdir() if "bertology" in path.name]


def test_draining_answers_what_was_accepted(remote, far, expected):
    with running(remote, registry=far) as started:
        found: list = []
        threads = [threading.Thread(target=lambda: found.append(started.post("/predict", ITEMS))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait(lambda: found or started.server.service.queue.items)
        kill(remote)
        started.server.drain()
        assert started.client.get("/health").json() == {"status": "draining"}
        for thread in threads:
            thread.join(120)
    assert len(found) == 4
    assert all(same(reply.json(), expected) for reply in found)
