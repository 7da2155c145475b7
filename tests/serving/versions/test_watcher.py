"""A server follows its directory, or a file that says what is wanted: what comes, changes and goes there."""

from __future__ import annotations

import asyncio
import json
import shutil
import time

from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import FairScheduler
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.lifecycle import Lifecycle
from bertology_serve.serving.versions.watcher import Reconciler, Watcher
from tests.serving.conftest import save_version
from tests.serving.running import running, wait


async def looks(watcher: Watcher, life: Lifecycle, times: int = 1) -> dict[str, str]:
    for _ in range(times):
        await watcher.look(await life.shelf())
    return {delta.name: delta.version for delta in life.registry.all() if delta.name != "base"}


def test_watching_follows_the_directory(made, encoder, root, caplog):
    async def go() -> None:
        life = Lifecycle(made, Metrics())
        watcher = Watcher(life, 1.0)
        assert await looks(watcher, life) == {"grade": "1", "mood": "2"}
        await life.load("mood", "1")
        await life.unload("grade")
        assert await looks(watcher, life) == {"mood": "1"}, "what was done by hand stays"
        save_version(encoder, root, "mood", "3", 5)
        good = (root / "mood" / "3" / "adapter_model.safetensors").read_bytes()
        (root / "mood" / "3" / "adapter_model.safetensors").write_bytes(good[:-8])
        assert await looks(watcher, life, 3) == {"mood": "1"}
        assert len([record for record in caplog.records if record.name.endswith("watcher")]) == 1
        (root / "mood" / "3" / "adapter_model.safetensors").write_bytes(good)
        assert await looks(watcher, life) == {"mood": "3"}
        (root / "mood" / "3" / "delta.json").write_text("{")
        assert await looks(watcher, life, 3) == {"mood": "3"}, "what cannot be read has not gone"
        shutil.rmtree(root / "mood")
        shutil.rmtree(root / "grade")
        assert await looks(watcher, life) == {"mood": "3"}
        assert await looks(watcher, life) == {}
        life.close()

    asyncio.run(go())


def test_a_server_that_watches(made, encoder, root):
    made.put("mood", "2")
    with running(made.pipeline, root=root, watch_seconds=0.02) as server:
        wait(lambda: server.client.get("/v2/models/grade/ready").status_code == 200)
        save_version(encoder, root, "mood", "3", 6)
        wait(lambda: server.client.get("/models/mood").json()["version"] == "3")
        away = root.rename(root.with_name("away"))
        time.sleep(0.1)
        assert server.client.get("/models/mood").json()["version"] == "3", "a directory that is not there says nothing"
        away.rename(root)


def test_a_state_file_is_obeyed_once_and_only_what_failed_is_tried_again(made, encoder, root, caplog):
    caplog.set_level("INFO", "bertology_serve")
    wanted = {"mood": {"version": "1"}, "grade": {"version": "77"}}
    state = root.with_name("wanted.json")

    def answering() -> dict[str, str]:
        return {delta.name: delta.version for delta in made.all() if delta.name != "base"}

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        queue = WorkQueue(FairScheduler(100), BatchTimes(1.0, 100), 1000)
        reconciler = Reconciler(state, life, queue, 1.0)
        state.write_text(json.dumps({"deltas": wanted, "others": "unload"}))
        for _ in range(3):
            await reconciler.look()
        assert answering() == {"mood": "1"}
        assert caplog.text.count("delta mood: version 1 answers") == 1
        assert caplog.text.count("no version '77'") == 1
        await life.load("mood", "2")
        await life.load("grade", "1")
        await reconciler.look()
        assert answering() == {"mood": "2", "grade": "1"}, "what was done by hand stays"
        save_version(encoder, root, "grade", "77", 7, like="grade")
        await reconciler.look()
        assert answering() == {"mood": "2", "grade": "77"}
        state.write_text(json.dumps({"deltas": {"mood": {"version": "1"}}, "others": "unload"}))
        await reconciler.look()
        assert answering() == {"mood": "1"}, "a new file counts as a whole"
        life.close()

    asyncio.run(go())


def test_a_load_that_changes_nothing_is_not_logged(made, caplog):
    caplog.set_level("INFO", "bertology_serve")

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        for version in ("1", "1", None, "2"):
            await life.load("mood", version)
        life.close()

    asyncio.run(go())
    answers = [record.getMessage() for record in caplog.records if "answers" in record.getMessage()]
    assert answers == ["delta mood: version 1 answers", "delta mood: version 2 answers"]
