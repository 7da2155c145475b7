"""Any order of load, unload, swap, split, pin, rollback, fault and call: what answers is what was said last, and what
is counted as resident is what is resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from bertology_serve.bench.prove.accounting import Fault, Walked, copying_fails, differences
from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import BertologyError, FormatError, NotFound, Overloaded
from bertology_serve.serving.versions.delta_cache import Tier
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import Split
from tests import tiny
from tests.serving.conftest import DELTAS

NAMES, VERSIONS = ("mood", "grade", "sense"), ("1", "2")
TEXT = "the cat was good"
NAME, VERSION = st.sampled_from(NAMES), st.sampled_from(VERSIONS)


class World:
    """The directory of deltas, and each version's answer alone."""

    def __init__(self, encoder: Encoder, root: Path) -> None:
        self.encoder, self.root = encoder, root
        self.answers: dict[tuple[str, str], list[float]] = {}
        for seed, name in enumerate(NAMES):
            for version in VERSIONS:
                delta = tiny.delta(encoder, name, *DELTAS[name], seed + 10 * int(version))
                path = store.save(delta, root / name / version, encoder.anatomy, encoder.config.to_dict())
                pipeline = Pipeline(encoder)
                pipeline.add(store.load(path, encoder.anatomy))
                self.answers[name, version] = numbers(pipeline, name)[1]


def numbers(pipeline: Pipeline, name: str, version: str = "") -> tuple[str, list[float]]:
    """The version that answers, and the numbers of its answer."""
    (found,) = pipeline.run([pipeline.prepare(Request(name, {"text": TEXT}, version=version))])
    value = found.answer.get("scores", found.answer.get("embedding", found.answer.get("value")))
    if isinstance(value, dict):
        value = list(value.values())
    return found.version, value if isinstance(value, list) else [value]


class Machine(RuleBasedStateMachine):
    """The device holds two or three deltas, the host one. ``model`` is what should answer, ``before`` what did."""

    world: World

    @initialize()
    def begin(self) -> None:
        self.registry = Registry(Walked(self.world.encoder), self.world.root, device_bytes=9000, host_bytes=4000)
        self.model: dict[str, str] = {}
        self.before: dict[str, str] = {}
        self.jobs: list[tuple[Any, str, str]] = []
        self.empty = self.registry.pipeline.bank.bytes

    def attempt(self, do: Any) -> bool:
        """Whether it was done; full is an answer too, but only where something must stay."""
        try:
            do()
        except Overloaded:
            assert self.registry.tiers.pins or self.registry.splits or self.jobs
            return False
        return True

    @rule(name=NAME, version=VERSION)
    def load(self, name: str, version: str) -> None:
        if self.attempt(lambda: self.registry.put(name, version)):
            self.answers(name, version)

    def answers(self, name: str, version: str) -> None:
        """Notes what should answer from now on."""
        if self.model.get(name, version) != version:
            self.before[name] = self.model[name]
        self.model[name] = version

    @rule(
        name=NAME, version=VERSION, at=st.integers(0, 1), what=st.sampled_from(("load", "raise", "rollback", "split"))
    )
    def fault(self, name: str, version: str, at: int, what: str) -> None:
        """Memory runs out in the middle of a change, after some of its pools: what answered goes on answering."""
        registry, before = self.registry, self.before.get(name)
        doing: dict[str, Any] = {
            "load": lambda: registry.put(name, version),
            "raise": lambda: registry.tiers.raise_up(name),
            "rollback": lambda: registry.rollback(name),
            "split": lambda: registry.split(name, Split("1", 0.5, "2")),
        }
        try:
            with copying_fails(at):
                doing[what]()
        except (BertologyError, Fault):
            return
        if what in ("load", "rollback"):
            self.answers(name, version if what == "load" else str(before))

    @rule(name=NAME)
    def unload(self, name: str) -> None:
        try:
            self.registry.remove(name)
            assert name in self.model
        except NotFound:
            assert name not in self.model
        self.model.pop(name, None)
        self.before.pop(name, None)

    @rule(name=NAME)
    def rollback(self, name: str) -> None:
        if name not in self.before or name not in self.model:
            with pytest.raises(NotFound):
                self.registry.rollback(name)
            return
        if self.attempt(lambda: self.registry.rollback(name)):
            self.answers(name, self.before[name])

    @rule(name=NAME, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.model:
            self.registry.tiers.pin(name, pinned and not self.registry.tiers.pins)

    @rule(name=NAME, canary=VERSION, shadow=st.sampled_from(("", *VERSIONS)))
    def split(self, name: str, canary: str, shadow: str) -> None:
        asked = Split(canary, 1.0, shadow)
        if name in self.model and self.attempt(lambda: self.registry.split(name, asked)):
            assert self.registry.splits.of(name) == asked
            if self.registry.pipeline.resident(name) is not None:
                assert numbers(self.registry.pipeline, name, canary)[0] == canary

    @rule(name=NAME)
    def end_split(self, name: str) -> None:
        self.registry.split(name, Split())

    @rule(name=NAME)
    def torn(self, name: str) -> None:
        """A version whose file is cut off: refused, and what answered goes on."""
        path = self.world.root / name / "9"
        path.mkdir(exist_ok=True)
        (path / "delta.json").write_bytes(b"{")
        try:
            with pytest.raises(FormatError):
                self.registry.put(name, "9")
        finally:
            (path / "delta.json").unlink()
            path.rmdir()

    @rule(name=NAME)
    def ask(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(NotFound):
                self.registry.find(name)
            return
        assert self.registry.find(name, self.model[name]).version == self.model[name]
        if self.attempt(lambda: self.registry.tiers.raise_up(name)):
            version, found = numbers(self.registry.pipeline, name)
            assert version == self.model[name]
            assert found == pytest.approx(self.world.answers[name, version], abs=1e-5)

    @rule(name=NAME)
    def queue(self, name: str) -> None:
        """A call that begins now and is computed later, whatever happens in between."""
        try:
            job = self.registry.pipeline.prepare(Request(name, {"text": TEXT}))
        except BertologyError:
            return
        self.jobs.append((job, name, job.ready.delta.version))

    @rule()
    def compute(self) -> None:
        jobs, self.jobs = self.jobs, []
        for prediction, (_, name, version) in zip(
            self.registry.pipeline.run([job for job, _, _ in jobs]), jobs, strict=True
        ):
            assert (prediction.delta, prediction.version) == (name, version)

    @invariant()
    def what_is_registered_is_what_was_said(self) -> None:
        if not hasattr(self, "model"):
            return
        tiers = self.registry.tiers
        assert {name: card.version for name, card in tiers.cards.items()} == self.model
        assert differences(self.registry) == []
        for name in self.model:
            assert (tiers.tier(name) is Tier.DEVICE) == (self.registry.pipeline.resident(name) is not None)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.jobs.clear()
        for name in NAMES:
            self.registry.split(name, Split())
        for name in list(self.model):
            self.registry.remove(name)
        pipeline = self.registry.pipeline
        pipeline.run([pipeline.prepare(Request("base", {"text": TEXT}))])
        assert pipeline.bank.entries == {}
        assert pipeline._beside == {}
        assert (self.registry.tiers.device_bytes, self.registry.tiers.host_bytes) == (0, 0)


def test_any_order_of_changes(encoder, tmp_path):
    machine = type("Placed", (Machine,), {"world": World(encoder, tmp_path)})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None),
    )
