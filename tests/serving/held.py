"""A pipeline that keeps its batches until it is let go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from bertology_serve.encoder.pipeline import Job, Pipeline, Prediction


class Held:
    """Batches wait for ``go``; ``busy`` is set while one does. ``batches`` are the texts that were computed."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.go, self.busy = pipeline, threading.Event(), threading.Event()
        self.batches: list[list[Any]] = []

    def run(self, jobs: Sequence[Job]) -> list[Prediction]:
        self.busy.set()
        assert self.go.wait(20)
        self.batches.append([job.request.record["text"] for job in jobs])
        return self.pipeline.run(jobs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    @property
    def texts(self) -> list[Any]:
        return [text for batch in self.batches for text in batch]
