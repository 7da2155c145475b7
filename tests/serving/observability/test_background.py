"""What goes on beside the calls: it is begun again, told of, counted, and not stopped by what lies on a disk."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import threading
from pathlib import Path

import pytest

from bertology_serve.bench.prove.fuzzed import scribble, vandalise, write_state
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BertologyError
from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import FairScheduler
from bertology_serve.serving.observability import background as module
from bertology_serve.serving.observability.background import Background, OnceLogger
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.lifecycle import Lifecycle
from bertology_serve.serving.versions.watcher import Reconciler, Watcher
from tests.serving.conftest import save_version
from tests.serving.running import running, wait


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.04)


def test_a_loop_that_ends_begins_again_and_is_counted(caplog):
    async def go() -> None:
        works, tries, done = Background(), [], asyncio.Event()

        async def run() -> None:
            tries.append(works.works["it"].up if "it" in works.works else True)
            if len(tries) < 4:
                raise ValueError("secret text")
            done.set()
            await asyncio.sleep(60)

        works.loop("it", run)
        await asyncio.wait_for(done.wait(), 20)
        assert tries == [True] * 4
        assert (works.works["it"].faults, works.works["it"].up, works.is_up) == (3, True, True)
        await works.close()
        assert not works._tasks

    asyncio.run(go())
    assert caplog.text.count("it ended (ValueError at") == 3
    assert "secret" not in caplog.text


def test_pauses_grow_and_those_that_ran_long_begin_at_once(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 5.0)
    works, state = Background(), module.WorkState(pause=1.0)
    pauses = [works._ended("it", state, ValueError(), 0.0) for _ in range(5)]
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert works._ended("it", state, ValueError(), module.STEADY + 1) == 1.0


def test_readiness_follows_the_threads_that_calls_need(caplog):
    works, go, ends = Background(), threading.Event(), iter([ValueError(), SystemExit()])

    def run() -> None:
        assert go.wait(20)
        for problem in ends:
            raise problem

    thread = works.thread("it", run, vital=True)
    assert works.is_up
    go.set()
    thread.join(120)
    assert not thread.is_alive()
    assert (works.works["it"].faults, works.is_up) == (2, True)
    works.works["it"].up = False
    assert not works.is_up
    assert "it ended (SystemExit at" in caplog.text


def test_work_that_is_done_once_is_not_repeated(caplog):
    async def go() -> None:
        works = Background()

        async def fail() -> None:
            raise KeyError("x")

        await works.once("shadow", fail)
        assert works.works["shadow"].faults == 1

    asyncio.run(go())
    assert "shadow: KeyError at" in caplog.text


def test_each_problem_is_told_once_until_it_changes_or_is_over(caplog):
    told = OnceLogger(logging.getLogger("here"))
    for reason in ("torn", "torn", "gone", "torn"):
        told.say("a", reason)
    told.say("b", "torn")
    told.keep({"b"})
    told.say("a", "torn")
    told.say("b", "torn")
    told.over("b")
    assert [record.getMessage() for record in caplog.records] == ["a: torn", "a: gone", "a: torn", "b: torn", "a: torn"]
    assert told.problems == {"a": "torn"}


def queue() -> WorkQueue:
    return WorkQueue(FairScheduler(100), BatchTimes(1.0, 100), 1000)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_lies_there_stops_nothing(encoder, deltas, tmp_path, seed):
    """Every change is looked at, by the watcher and by the reconciler; afterwards both do as they are told."""
    root, state, draw = tmp_path / "deltas", tmp_path / "state.json", random.Random(seed)
    shutil.copytree(deltas, root)
    save_version(encoder, root, "probe", "1", 1)
    save_version(encoder, root, "probe", "2", 2)
    made = Registry(Pipeline(encoder))
    made.load(root)

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        watcher, reconciler = Watcher(life, 1.0), Reconciler(state, life, queue(), 1.0)
        for number in range(100):
            change = vandalise(draw, root, deltas)
            scribble(draw, state)
            try:
                await watcher.look(await life.shelf())
                await reconciler.look()
                assert "base" in {entry.name for entry in await life.index()}
            except BertologyError as problem:
                raise AssertionError(f"change {number}, {change}") from problem
        await watcher.look(await life.shelf())
        await life.load("probe", "2")
        write_state(state, {"deltas": {"probe": {"version": "1"}}})
        await reconciler.look()
        assert made.find("probe").version == "1"
        save_version(encoder, root, "probe", "3", 3)
        await watcher.look(await life.shelf())
        assert made.find("probe").version == "3"
        life.close()

    asyncio.run(go())


def test_a_file_of_too_many_dimensions_costs_its_delta_alone(encoder, deltas, root, caplog):
    made = Registry(Pipeline(encoder))
    made.load(root)
    header = b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 65) + b'],"data_offsets":[0,4]}}'
    bad = root / "aaa" / "1"
    shutil.copytree(root / "mood" / "1", bad)
    (bad / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    save_version(encoder, root, "zzz", "1", 5)
    with running(made.pipeline, root=root, registry=made, watch_seconds=0.02) as server:
        wait(lambda: server.client.get("/v2/models/zzz/ready").status_code == 200)
        metrics = server.client.get("/metrics").text
    assert 'bertology_background_up{work="watcher"} 1.0' in metrics
    assert 'bertology_background_faults_total{work="watcher"} 0.0' in metrics
    assert caplog.text.count("aaa/1/adapter_model.safetensors") == 1
    assert [one.path for one in Registry(Pipeline(encoder)).load(root, skip_bad=True)] == [bad]


def test_a_watcher_that_fails_is_seen_and_goes_on(made, encoder, root, monkeypatch):
    shelf, fails = Registry.shelf, iter([True, True])

    def torn(self: Registry):
        if next(fails, False):
            raise RuntimeError("nobody foresaw this")
        return shelf(self)

    monkeypatch.setattr(Registry, "shelf", torn)
    with running(made.pipeline, root=root, watch_seconds=0.02) as server:
        wait(lambda: server.client.get("/v2/models/mood/ready").status_code == 200)
        assert 'bertology_background_faults_total{work="watcher"} 2.0' in server.client.get("/metrics").text
        assert server.client.get("/v2/health/ready").status_code == 200


def test_not_ready_while_the_executor_s_thread_is_down(pipeline, monkeypatch):
    """Its calls are answered whatever raises, and it begins again."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 1.0)
    with running(pipeline) as server:
        executor, item = server.server.service._executor, {"delta": "mood", "text": "the cat"}
        observe = executor._observe

        def fail(*_: object) -> None:
            executor._observe = observe
            raise RuntimeError("a metric that is none")

        executor._observe = fail
        assert server.post("/predict", item).status_code == 200
        wait(lambda: server.client.get("/v2/health/ready").status_code == 503)
        assert server.client.get("/health").json() == {"status": "restarting"}
        assert server.post("/predict", item).status_code == 200, "what comes meanwhile waits"
        wait(lambda: server.client.get("/v2/health/ready").status_code == 200)
        served = server.server.service.queue.served

        def refuse(*_: object) -> None:
            server.server.service.queue.served = served
            raise RuntimeError("times that are none")

        server.server.service.queue.served = refuse
        assert server.post("/predict", item).status_code == 200
        wait(lambda: 'faults_total{work="executor"} 2.0' in server.client.get("/metrics").text)


def test_what_the_state_file_says_of_others_leaves_exports_alone(made, root, tmp_path, monkeypatch):
    made.put("mood")
    made.put("grade")
    state = tmp_path.with_name("state.json")
    made.models.add("grade")
    write_state(state, {"deltas": {"mood": {"version": "1"}}, "others": "unload"})

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        reconciler = Reconciler(state, life, queue(), 1.0)
        await reconciler.look()
        assert {delta.name: delta.version for delta in made.all()[1:]} == {"mood": "1", "grade": "1"}
        made.models.clear()
        reconciler._seen = None
        unload = life.unload

        async def twice(name: str) -> None:
            await unload(name)
            await unload(name)

        monkeypatch.setattr(life, "unload", twice)
        await reconciler.look()
        assert [delta.name for delta in made.all()] == ["base", "mood"], "somebody was faster, and that is fine"
        life.close()

    asyncio.run(go())


def test_the_watcher_leaves_exports_alone(made, encoder, root):
    made.models.add("mood")

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        watcher = Watcher(life, 1.0)
        for _ in range(3):
            await watcher.look(await life.shelf())
        assert made.resident() == ["grade"]
        life.close()

    asyncio.run(go())


def test_a_bare_directory_that_was_renamed_is_read_where_it_lies(made, root, deltas, caplog):
    shutil.rmtree(root / "mood")
    shutil.copytree(deltas / "mood" / "1", root / "loose")

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        watcher = Watcher(life, 1.0)
        await watcher.look(await life.shelf())
        (root / "loose").rename(root / "moved")
        await watcher.look(await life.shelf())
        assert made.tiers.cards["mood"].path == root / "moved"
        life.close()

    asyncio.run(go())
    assert "moved: answers as 'mood', the name in its delta.json" in caplog.text


def test_a_directory_that_cannot_be_read_any_more_gives_way_to_no_older_one(made, root, encoder):
    shutil.rmtree(root / "mood")
    for seed in (1, 2):
        save_version(encoder, root, "mood", str(seed), seed)
        (root / "mood" / str(seed)).rename(root / f"loose-{seed}")
        os.utime(root / f"loose-{seed}" / "delta.json", (seed, seed))

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        watcher = Watcher(life, 1.0)
        await watcher.look(await life.shelf())
        served = made.find("mood").version
        assert made.tiers.cards["mood"].path == root / "loose-2"
        (root / "loose-2" / "delta.json").write_text("{")
        for _ in range(3):
            await watcher.look(await life.shelf())
        assert made.find("mood").version == served
        shutil.rmtree(root / "loose-2")
        await watcher.look(await life.shelf())
        assert made.tiers.cards["mood"].path == root / "loose-1"
        life.close()

    asyncio.run(go())


def test_a_state_file_that_never_ends_is_not_waited_for(made, root, tmp_path):
    state: Path = tmp_path.with_name("pipe.json")
    os.mkfifo(state)

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        reconciler = Reconciler(state, life, queue(), 1.0)
        await asyncio.wait_for(reconciler.look(), 20)
        assert "no regular file" in str(reconciler._told.problems)
        life.close()

    asyncio.run(go())
