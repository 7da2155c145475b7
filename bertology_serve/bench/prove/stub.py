"""A server whose tokenizer and model cost nothing, to see what the rest costs: run as a module, for figure 13."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Job, Pipeline, Prediction, Request
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.execution.startup import settle_memory
from bertology_serve.serving.http.listening import bind, url_of
from bertology_serve.serving.server import Server
from bertology_serve.serving.versions.delta_registry import Registry

ANSWER = {"label": "good", "score": 0.7, "scores": {"bad": 0.2, "good": 0.7, "so-so": 0.1}}


class Stub(Pipeline):
    """Answers without reading."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known = Job(Request("base", {"text": "a text"}), self.base)
        super().tokenise(self._known)

    def tokenise(self, job: Job) -> None:
        """What was made before, for this job."""
        known = self._known
        job.example, job.encodings = known.example, known.encodings
        job.cost = job.charged = known.cost

    def run(self, jobs: Sequence[Job]) -> list[Prediction]:
        """The same answer to each."""
        return [Prediction("base", "1", "classification", ANSWER, job.request.id) for job in jobs]


def main(backbone: str) -> None:
    """Serves until SIGTERM; says its address on stderr as ``serve`` does."""
    pipeline = Stub(Encoder.load(backbone))
    with bind("127.0.0.1", 0) as bound:
        address = url_of(bound)
        server = Server(Registry(pipeline), ServerConfig.of(drain_seconds=0.0),
                        lambda: print(f"ready: {address}", file=sys.stderr, flush=True))  # fmt: skip
        settle_memory()
        server.run(sockets=[bound])


if __name__ == "__main__":
    main(sys.argv[1])
