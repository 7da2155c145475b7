"""Figure 9: who has hung up costs no compute."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import Stage
from bertology_serve.encoder.pipeline import Job, Pipeline, Prediction, Request
from bertology_serve.serving.batching.scheduler import CallContext
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.service import ClientGone, Service
from bertology_serve.serving.versions.delta_registry import Registry


class Gated(Pipeline):
    """Batches wait for ``go``; ``texts`` are those that were computed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.go, self.busy, self.texts = threading.Event(), threading.Event(), list[Any]()

    def run(self, jobs: Sequence[Job]) -> list[Prediction]:
        """One batch."""
        self.busy.set()
        self.go.wait(60)
        self.texts += [job.request.record["text"] for job in jobs]
        return super().run(jobs)


def measure(stage: Stage) -> Measured:
    """Calls that wait in the queue lose their clients while a batch is held up."""
    calls = stage.count(200, 1000)
    pipeline = Gated(stage.encoder)
    gone, dropped = asyncio.run(_run(pipeline, calls))
    computed = sum(text.startswith("gone") for text in pipeline.texts)
    words = f"{gone} clients hung up while queued: {computed} of their texts computed, {dropped} dropped"
    return Measured(words, computed == 0 and gone == dropped == calls, {"computed": computed, "gone": gone})


async def _run(pipeline: Gated, calls: int) -> tuple[int, int]:
    service = Service(Registry(pipeline), ServerConfig(), Metrics())
    service.start()
    first = asyncio.create_task(service.answer(CallContext(), [Request("base", {"text": "first"})]))
    await asyncio.to_thread(pipeline.busy.wait, 60)
    leave = list[Callable[[], None]]()
    waiting = [
        asyncio.create_task(
            service.answer(CallContext(watch=leave.append), [Request("base", {"text": f"gone {number}"})])
        )
        for number in range(calls)
    ]
    await asyncio.sleep(0.1)
    queued = service.queue.items
    for left in leave:
        left()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    dropped = queued - service.queue.items
    pipeline.go.set()
    await first
    await service.stop()
    return sum(isinstance(outcome, ClientGone) for outcome in outcomes), dropped
