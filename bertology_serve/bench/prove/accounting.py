"""Figure 18: what is counted as resident is what is resident, whatever comes, goes and fails."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import Stage
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import RowPool, Rows
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Job, LoadedDelta, Pipeline, Request
from bertology_serve.errors import BertologyError
from bertology_serve.serving.versions.cards import read_card
from bertology_serve.serving.versions.delta_cache import place_of
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import Split

NAMES, VERSIONS = ("mood", "grade", "names", "tone"), ("1", "2", "3")
DEVICE, HOST = 3.0, 1.5  # times the largest delta
JOBS = 4  # calls under way, at most


class Fault(Exception):
    """Was asked for."""


class Walked(Pipeline):
    """Knows every version that is still there, whoever holds it."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.alive: WeakSet[LoadedDelta] = WeakSet()

    def admit(self, key: str, delta: Delta) -> LoadedDelta:
        """As it is, and noted."""
        ready = super().admit(key, delta)
        self.alive.add(ready)
        return ready


@contextmanager
def copying_fails(at: int) -> Iterator[None]:
    """The rows of the ``at``-th pool from now on are not copied: Fault, as memory may run out."""
    put, left = RowPool.put, iter(range(at, -1, -1))

    def fails(pool: RowPool, rows: Rows) -> int:
        if next(left, 0) == 0:
            raise Fault
        return put(pool, rows)

    with mock.patch.object(RowPool, "put", fails):
        yield


def differences(registry: Registry) -> list[str]:
    """How the books differ from a walk through what is there; nothing, if all is well. The pipeline is ``Walked``."""
    pipeline, tiers = registry.pipeline, registry.tiers
    assert isinstance(pipeline, Walked)
    alive = list(pipeline.alive)
    answering = [ready for ready in (*pipeline._ready.values(), *pipeline._beside.values()) if ready in pipeline.alive]
    held = {ready.entry.key for ready in alive if ready.delta.specs}
    capacity, asked = (
        tiers._device.capacity,
        {place_of(card) for card in (*tiers.cards.values(), *tiers._before.values())},
    )
    stray = [(name, version) for name, version in pipeline._beside if version not in registry.splits.of(name).versions]
    pairs: list[tuple[str, Any, Any]] = [
        ("device bytes", tiers.device_bytes, sum(pipeline.resident_bytes(ready.delta) for ready in alive)),
        ("host bytes", tiers.host_bytes, sum(delta.bytes for delta in tiers._deltas.values())),
        ("deltas with rows", pipeline.bank.entries.keys() - set(pipeline.ledger.gone), held),
        ("deltas that may be evicted", set(tiers._device), pipeline._ready.keys() - {"base"}),
        ("names remembered", {*tiers._before, *tiers._costs, *tiers._failed, *tiers._left} - tiers.cards.keys(), set()),
        ("versions kept on the host", tiers._deltas.keys() - asked, set()),
        ("versions beside without a split", stray, []),
        ("locks held", list(tiers._locks), []),
        ("what answers fits", sum(pipeline.resident_bytes(ready.delta) for ready in answering) <= capacity, True),
        ("with what leaves, twice", tiers.device_bytes <= 2 * capacity, True),
        ("the host's fits", tiers.host_bytes <= tiers._host.capacity, True),
    ]
    for name, pool in pipeline.bank.pools.items():
        taken = [extent for own in pipeline.bank._extents.values() for extent in own if extent[0] == name]
        rows = sorted([*pool.free, *((first, first + count) for _, first, count in taken)])
        ends = [1, *(end for _, end in rows)]
        pairs.append((f"rows of {name}", [*(start for start, _ in rows), pool.capacity], ends))
    return [f"{what}: {counted} counted, {found} found" for what, counted, found in pairs if counted != found]


class Play:
    """Random steps on one registry; each may fail, and some are made to."""

    def __init__(self, encoder: Encoder, root: Path, draw: random.Random) -> None:
        cards = [read_card(root / name / VERSIONS[0], name, root) for name in NAMES]
        largest = max(card.size for card in cards if card is not None)
        self.registry = Registry(Walked(encoder), root, DEVICE * largest, HOST * largest)
        self._draw, self._jobs = draw, list[Job]()
        self._steps = (
            self.load, self.load, self.fail, self.fail, self.fail, self.ask, self.ask, self.roll_back, self.split,
            self.pin, self.unload, self.queue, self.queue, self.compute,
        )  # fmt: skip

    def step(self) -> str:
        """One step; what became of it."""
        step = self._draw.choice(self._steps)
        name = self._draw.choice(NAMES) if self._draw.random() < 0.95 else f"unknown-{self._draw.random()}"
        try:
            step(name)
        except (BertologyError, Fault) as problem:
            return type(problem).__name__
        return step.__name__

    def load(self, name: str) -> None:
        """A version, new or not."""
        self.registry.put(name, self._draw.choice(VERSIONS))

    def fail(self, name: str) -> None:
        """A change in the middle of which memory runs out."""
        with copying_fails(self._draw.randrange(2)):
            self._draw.choice((self.load, self.load, self.ask, self.roll_back, self.split))(name)

    def ask(self, name: str) -> None:
        """Brings a delta up."""
        self.registry.tiers.raise_up(name)

    def roll_back(self, name: str) -> None:
        """Back to the version before."""
        self.registry.rollback(name)

    def split(self, name: str) -> None:
        """A canary, a shadow, both, the same, or none."""
        canary, shadow = (self._draw.choice(("", "", *VERSIONS)) for _ in range(2))
        self.registry.split(name, Split(canary, 0.5, shadow))

    def pin(self, name: str) -> None:
        """One delta, or none."""
        for other in list(self.registry.tiers.pins):
            self.registry.tiers.pin(other, False)
        if name in self.registry.tiers.cards:
            self.registry.tiers.pin(name)

    def unload(self, name: str) -> None:
        """Away with it."""
        self.registry.remove(name)

    def queue(self, name: str) -> None:
        """A call that begins now and is computed later."""
        version = self.registry.splits.of(name).canary if self._draw.random() < 0.5 else ""
        self._jobs.append(self.registry.pipeline.prepare(Request(name, {"text": "a cold river"}, version=version)))
        if len(self._jobs) > JOBS:
            self.compute(name)

    def compute(self, name: str) -> None:
        """Answers the calls under way."""
        jobs, self._jobs = self._jobs, []
        self.registry.pipeline.run(jobs)


def measure(stage: Stage) -> Measured:
    """Loads, swaps, splits, rollbacks, evictions, faults and calls at random; the books are looked at after each."""
    root = stage.directory / "accounting"
    for seed, (name, version) in enumerate((name, version) for name in NAMES for version in VERSIONS):
        stage.save(root, name, version, seed)
    play = Play(stage.encoder, root, random.Random(0))
    steps, found, off = stage.count(1000, 10_000), Counter[str](), []
    for number in range(steps):
        found[play.step()] += 1
        off += [f"step {number}: {one}" for one in differences(play.registry)]
    play.compute("")
    for name in list(play.registry.tiers.cards):
        play.registry.remove(name)
    left = play.registry.tiers.device_bytes + play.registry.tiers.host_bytes
    words = (
        f"{steps:,} steps, {found['Fault']:,} with faults, {play.registry.tiers.evictions:,} evictions: counted and "
        f"resident differed after {len(off)}; {left} bytes left at the end"
    )
    return Measured(words, not off and left == 0, {"off": off[:20], "left": left, **found})
