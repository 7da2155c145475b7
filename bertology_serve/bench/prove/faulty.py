"""A server in which things go wrong: run as a module, for figure 1. Its deltas raise, its disk is slow."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bertology_serve.bench.prove.stage import ADMIN
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import DeltaSet, Job, Pipeline, Prediction
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.execution.executor_handle import ForkServer, WorkerOptions
from bertology_serve.serving.execution.remote import Remote
from bertology_serve.serving.http.listening import bind, url_of
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.server import Server
from bertology_serve.serving.versions.cards import read_card
from bertology_serve.serving.versions.delta_registry import Registry, newest

RAISES, SLOW = 0.05, 0.3  # shares of batches, and of reads
DELAY = 0.05


class Faults(DeltaSet):
    """Some batches raise; alone again, some items do."""

    draw = random.Random(0)

    def run(self, jobs: Sequence[Job]) -> list[Prediction]:
        """A batch, or a fault."""
        if self.draw.random() < RAISES:
            raise RuntimeError("a fault, as asked for")
        return super().run(jobs)


class Faulty(Faults, Pipeline):
    """In this process."""


class FaultyRemote(Faults, Remote):
    """With an executor of its own, for others to kill."""


class SlowDisk(Registry):
    """Some reads take their time."""

    def _read(self, path: Path, name: str) -> Delta:
        if random.random() < SLOW:
            time.sleep(DELAY)
        return super()._read(path, name)


def make(pipeline: DeltaSet, root: Path) -> SlowDisk:
    """Half of the deltas fit."""
    cards = [read_card(one.path, one.name, one.path) for one in newest(root, False, [])]
    registry = SlowDisk(pipeline, device_bytes=sum(card.size for card in cards if card) * 0.6)
    registry.load(root)
    return registry


def main(backbone: str, root: str) -> None:
    """Serves until SIGTERM; says its address on stderr as ``serve`` does."""
    ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)])
    with bind("127.0.0.1", 0) as bound, ForkServer(WorkerOptions(backbone, log_level="error")) as nursery:
        pipeline = FaultyRemote(nursery, backbone)
        registry = make(pipeline, Path(root))
        address = url_of(bound)
        server = Server(registry, ServerConfig.of(drain_seconds=0.0),
                        lambda: print(f"ready: {address}", file=sys.stderr, flush=True), ring)  # fmt: skip
        server.run(sockets=[bound])
        pipeline.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
