"""A server follows its directory: what comes, changes and goes there."""

from __future__ import annotations

import asyncio
import shutil
import time

from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.lifecycle import Lifecycle
from bertology_serve.serving.versions.watcher import Watcher
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
