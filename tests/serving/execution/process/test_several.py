"""Two executors under one queue: what either runs, what is left when one ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bertology_serve.encoder.pipeline import Request
from bertology_serve.errors import NotFound, SpecError
from bertology_serve.serving.execution.channel import Op
from bertology_serve.serving.execution.engine_choice import EngineConfig
from bertology_serve.serving.execution.executor_handle import WorkerPlace
from bertology_serve.serving.execution.remote import Remote
from bertology_serve.serving.execution.startup import places
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.conftest import RECORDS, save_version
from tests.serving.execution.process.test_remote import answers
from tests.serving.execution.process.test_serving import ITEMS, same
from tests.serving.running import running, wait

REQUESTS = [Request(name, record, logits=True) for name, record in RECORDS.items() if name != "labels"]  # known later


@pytest.fixture(scope="module")
def two(remote: Remote, encoder, deltas: Path) -> Iterator[Registry]:
    """Those of ``far``, in two executors of the same fork server."""
    nursery = remote.supervisors[0]._nursery
    outline, patch = remote.encoder, pytest.MonkeyPatch()
    told = {name: getattr(outline, name) for name in ("hidden", "depth", "max_tokens", "is_pruned", "packing")}
    told |= {"ref": vars(outline.ref), "base_task": asdict(outline.base_task), "refusal": ""}
    patch.setattr(nursery, "outline", lambda: told)  # which it says once
    core = min(os.sched_getaffinity(0))
    made = Remote(nursery, encoder.name, [WorkerPlace("cpu", 1, (core,)), WorkerPlace("cpu", 1)])
    patch.undo()
    registry = Registry(made)
    assert registry.load(deltas) == []
    yield registry
    made.close()


def own(registry: Registry) -> Remote:
    assert isinstance(registry.pipeline, Remote)
    return registry.pipeline


def test_each_runs_any_batch_as_one_does(two, far):
    remote, expected = own(two), answers(far.pipeline, REQUESTS)
    for one in remote.supervisors:
        others = [remote._idle.get() for _ in remote.supervisors]
        remote._idle.put(one)
        try:
            assert same(answers(remote, REQUESTS), expected)  # the other ran with as many threads as there are
        finally:
            remote._idle.get()
            for other in others:
                remote._idle.put(other)
    assert os.sched_getaffinity(remote.supervisors[0].pid) == {min(os.sched_getaffinity(0))}
    assert os.sched_getaffinity(remote.supervisors[1].pid) == os.sched_getaffinity(0)


def test_one_works_while_the_other_does(two):
    """A stopped process stands for one in the middle of a batch."""
    remote, found = own(two), list[object]()
    stopped = remote._idle.get()
    remote._idle.put(remote._idle.get())
    remote._idle.put(stopped)
    os.kill(stopped.pid, signal.SIGSTOP)
    threads = [threading.Thread(target=lambda: found.append(answers(remote, REQUESTS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: len(found) == 1)
        answers(remote, REQUESTS)
        assert len(found) == 1, "the other one is still at it"
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1]


def test_what_comes_and_leaves_does_so_on_both(two, encoder, tmp_path):
    remote, before = own(two), set(own(two)._held)
    save_version(encoder, tmp_path, "brief", "1", 3)
    registry = Registry(remote, tmp_path)
    registry.put("brief")
    body = {"keys": [(key, False) for key in remote._held.keys() - before], "sizes": (0, 0)}
    for one in remote.supervisors:
        with pytest.raises(RuntimeError, match="ValueError"):  # it is there; the batch is empty
            one.line().batches.ask(Op.RUN, body)
    registry.remove("brief")
    for one in remote.supervisors:
        with pytest.raises(NotFound, match="did not come back"):
            one.line().batches.ask(Op.RUN, body)


def test_both_have_the_engine_that_was_settled(two):
    remote = own(two)
    name, _ = remote.settle(EngineConfig("torch", prepack=False))
    assert name == "torch"
    assert answers(remote, REQUESTS) == answers(remote, REQUESTS)


def test_calls_go_on_while_one_is_killed_and_comes_back(two, server):
    remote, expected = own(two), server.post("/predict", ITEMS).json()
    remote.settle(EngineConfig("torch", prepack=False))
    with running(remote, registry=two) as served:
        found: list[list] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                found.append(served.post("/predict", ITEMS).json())

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        nursery = remote.supervisors[0]._nursery._process.pid
        for one in remote.supervisors:
            wait(lambda: len(found) > 4)
            os.kill(nursery, signal.SIGSTOP)  # no other one comes
            os.kill(one.pid, signal.SIGKILL)
            wait(lambda one=one: not one.is_up)
            found.clear()
            wait(lambda: len(found) > 12)
            assert served.client.get("/v2/health/ready").status_code == 200
            os.kill(nursery, signal.SIGCONT)
            wait(lambda one=one: one.is_up)
        done.set()
        for thread in threads:
            thread.join(60)
        assert all(same(answer, expected) for answer in found)
        assert "bertology_executor_restarts_total 2.0" in served.client.get("/metrics").text


def test_where_they_run(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 4, 8, 16})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert places("cpu", 1) == [WorkerPlace("cpu", 5)]
    assert places("cpu", 2) == [WorkerPlace("cpu", 2, (1, 2)), WorkerPlace("cpu", 2, (4, 8, 16))]
    with pytest.raises(SpecError, match="there are 5 cores"):
        places("cpu", 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [one.device for one in places("cuda:1", 2)] == ["cuda:1", "cuda:2"]
    with pytest.raises(SpecError, match="there are 3 GPUs"):
        places("cuda", 4)
