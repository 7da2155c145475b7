"""Every figure in very small, with the server in this process; and that each sees what it is there to see."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.bench.prove import (
    accounting,
    cancelled,
    clients,
    cold,
    contract,
    cores,
    drain,
    exactly_one_answer,
    fairness,
    fuzzed,
    hostile,
    isolation,
    leaks,
    overhead,
    overload,
    swaps,
)
from bertology_serve.bench.prove.figure import Figure, Measured, prove
from bertology_serve.bench.prove.figures import FIGURES
from bertology_serve.bench.prove.stage import ADMIN, ZOO, Stage
from bertology_serve.bench.prove.traffic import Outcomes, percentile
from bertology_serve.encoder.delta_set import Ledger
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import Overloaded, VerificationError
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.running import Running, running


class Near:
    """A server of this process as ``Served`` shows one of another."""

    def __init__(self, server: Running) -> None:
        self.url, self.pid, self._server = server.url.rstrip("/"), os.getpid(), server.server

    @property
    def cpu(self) -> float:
        return time.process_time()

    def terminate(self) -> None:
        self._server.drain()


@pytest.fixture(scope="module")
def stage(encoder, tmp_path_factory) -> Iterator[Stage]:
    made = Stage(encoder.name, tmp_path_factory.mktemp("prove"), quick=True, pace=0.02)
    made._encoder.append(encoder)

    @contextmanager
    def server(self: Stage, deltas: Path, *options: str, environ: Any = None) -> Iterator[Near]:
        pairs = zip(options[::2], options[1::2], strict=True)
        words = {name[2:].replace("-", "_"): value for name, value in pairs if name != "--engine"}
        files = {"state_file": Path(words.pop("state_file"))} if "state_file" in words else {}
        given = {name: float(value) for name, value in words.items()}
        room = given.pop("device_mb", None)
        registry = Registry(Pipeline(encoder), deltas, float("inf") if room is None else 40_000)
        given.pop("host_mb", None)
        registry.load(deltas)
        ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)])
        numbers = {
            name: int(value) if name.endswith(("tokens", "connections")) else value for name, value in given.items()
        }
        with running(registry.pipeline, ring, deltas, registry, **numbers, **files) as started:
            yield Near(started)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "server", server)
        patch.setattr(cores, "pair", lambda: None)
        yield made


def test_faults(stage, encoder, monkeypatch):
    from bertology_serve.bench.prove import faulty

    @contextmanager
    def near(command: list[str], environ: Any) -> Iterator[Near]:
        registry = faulty.make(faulty.Faulty(encoder), Path(command[-1]))
        ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)])
        with running(registry.pipeline, ring, registry=registry) as started:
            yield Near(started)

    monkeypatch.setattr(exactly_one_answer, "serving", near)
    monkeypatch.setattr(
        exactly_one_answer, "BETWEEN_KILLS", 3600.0
    )  # there is no executor's process here, however long it takes
    small = dataclasses.replace(stage, pace=0.15, _encoder=stage._encoder)
    found = exactly_one_answer.measure(small)
    assert found.holds, found.words
    assert found.facts["answered"] > 100
    assert found.facts["hung up"] > 0
    write = "bertology_serve.serving.protocol.native.answer_of"
    monkeypatch.setattr(write, lambda request, prediction: {"id": 7, **prediction.as_dict()})
    blind = exactly_one_answer.measure(small)
    assert blind.facts["swapped"] > 100
    assert not blind.holds


def test_fuzzed(stage, monkeypatch):
    small = dataclasses.replace(stage, pace=0.2, _encoder=stage._encoder)
    found = fuzzed.measure(small)
    assert found.holds, found.words
    assert found.facts == {"changes": 20, "stops": 0, "deaf": 0}
    shelf, fails = Registry.shelf, iter([True])
    monkeypatch.setattr(Registry, "shelf", lambda self: 1 / 0 if next(fails, False) else shelf(self))
    stopped = fuzzed.measure(small)
    assert stopped.facts["stops"] == 1
    assert not stopped.holds


def test_what_is_no_number_is_apart_from_everything():
    assert isolation.apart([1.0, float("nan")], [1.0, 2.0]) == isolation.apart([1.0], [float("nan")]) == float("inf")


def test_isolation(stage, monkeypatch):
    found = isolation.measure(stage)
    assert found.holds, found.words
    assert found.facts["rows"] == 60
    run = Pipeline.run

    def swapped(self: Pipeline, jobs: Any) -> Any:
        return run(self, jobs) if len(jobs) == 1 else run(self, jobs)[::-1]

    monkeypatch.setattr(Pipeline, "run", swapped)
    assert not isolation.measure(stage).holds


def test_memory(stage, monkeypatch):
    found = leaks.measure(dataclasses.replace(stage, pace=0.08, _encoder=stage._encoder))
    assert found.facts["device"] == 0
    assert found.facts["cycles"] == 32
    sizes = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(leaks, "resident", lambda: next(sizes))
    assert not leaks.measure(dataclasses.replace(stage, pace=0.08, _encoder=stage._encoder)).holds


def test_swaps(stage):
    found = swaps.measure(dataclasses.replace(stage, pace=0.12, _encoder=stage._encoder))
    assert found.holds, found.words


def test_drain(stage):
    found = drain.measure(stage)
    assert found.facts["answered"] > 0
    assert "lost" not in found.facts
    assert "not ready after" in found.words


def test_cancelled(stage, monkeypatch):
    found = cancelled.measure(stage)
    assert found.holds, found.words
    monkeypatch.setattr("bertology_serve.serving.service.Service._cancel", lambda *_: None)
    assert not cancelled.measure(stage).holds


def test_clients(stage, monkeypatch, tmp_path):
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(lambda: httpx.Client(timeout=120))  # offline tests forbid it even the loopback
    try:
        found = clients.measure(stage)
    finally:
        set_client_factory(default_client_factory)
    assert found.holds, found.words
    assert len(found.facts["passed"]) == len(clients.CLIENTS)
    strange = {"none": ("no_such_module", lambda _: True), "bad": ("httpx", lambda _: 1 / 0), "no": ("httpx", bool)}
    monkeypatch.setattr(clients, "CLIENTS", strange)
    blind = clients.measure(stage)
    assert (blind.facts["absent"], blind.facts["failed"]) == (["none"], ["bad (ZeroDivisionError)"])
    assert not blind.holds


def test_cold(stage):
    found = cold.measure(dataclasses.replace(stage, pace=0.1, _encoder=stage._encoder))
    assert found.facts["loaded"] > 0
    assert found.facts["ratios"][0] > 0


def test_fairness(stage):
    found = fairness.measure(dataclasses.replace(stage, pace=0.08, _encoder=stage._encoder))
    assert "calls of the flooder answered" in found.words
    assert found.facts["refused"] == 0


def test_overload(stage):
    found = overload.measure(dataclasses.replace(stage, pace=0.08, _encoder=stage._encoder))
    assert found.facts["peaks"][0] > 0
    assert found.words.endswith("0 without Retry-After")


def test_overhead(stage, encoder, monkeypatch):
    """In no time at all, as a very slow machine has it: each client is answered once, one batch is run."""
    from bertology_serve.bench.prove.stub import Stub

    @contextmanager
    def near(command: list[str], environ: Any) -> Iterator[Near]:
        with running(Stub(encoder)) as started:
            assert started.post("/predict", {"delta": "base", "text": "y"}).json()["label"] == "good"
            yield Near(started)

    monkeypatch.setattr(overhead, "serving", near)
    found = overhead.measure(dataclasses.replace(stage, pace=1e-9, _encoder=stage._encoder))
    assert found.facts["bare"][0]["texts_s"] > 0
    assert found.facts["http"][0]["cpu_ms"] > 0
    assert not found.facts["pinned"]


def test_contract(stage, monkeypatch):
    some = dict(list(contract.operations().items())[:2])
    monkeypatch.setattr(contract, "operations", lambda: some)
    found = contract.measure(dataclasses.replace(stage, pace=0.5, _encoder=stage._encoder))
    assert found.holds, found.words
    assert found.facts["answered"] >= 10
    monkeypatch.setattr(contract, "HEADERS", {"Authorization": "Bearer a-key-that-is-not-known"})
    monkeypatch.setattr("bertology_serve.serving.http.errors._STATUS", ())
    blind = contract.measure(dataclasses.replace(stage, pace=0.5, _encoder=stage._encoder))
    assert list(blind.facts["failed"]) == list(some)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in contract.measure(stage).words


def test_hostile_connections(stage, monkeypatch):
    found = hostile.connections(stage)
    assert found.facts["harmed"] == 0
    assert "64 attackers" in found.words
    monkeypatch.setattr(hostile, "GROWTH", float("inf"))
    monkeypatch.setattr(hostile, "LIVENESS", float("inf"))
    assert hostile.connections(stage).holds
    sizes = itertools.count(0, 10**9)
    monkeypatch.setattr(hostile, "resident_bytes", lambda pid: next(sizes))
    monkeypatch.setattr(hostile, "GROWTH", 20 * 2**20)
    assert not hostile.connections(stage).holds


def test_hostile(stage, monkeypatch):
    small = dataclasses.replace(stage, pace=0.3, _encoder=stage._encoder)
    found = hostile.measure(small)
    assert (found.facts["published"], found.facts["crashed"], found.facts["faults"]) == ([], [], [])
    put = Registry.put

    def careless(self: Registry, name: str, version: str | None = None) -> Any:
        if not (self.root / "mood" / "1" / hostile.MANIFEST).is_file():
            raise KeyError("a crash")
        self.tiers.cards["mood"] = self.pipeline.deltas["base"]
        return put

    monkeypatch.setattr(Registry, "put", careless)
    blind = hostile.measure(dataclasses.replace(stage, pace=0.1, _encoder=stage._encoder))
    assert blind.facts["published"]
    assert blind.facts["crashed"]
    assert not blind.holds


def test_what_a_start_takes(stage, monkeypatch):
    seconds = iter([6.0, 3.0, 6.0, 3.6])
    monkeypatch.setattr(Near, "cpu", property(lambda server: next(seconds)))
    monkeypatch.setattr(leaks, "resident_bytes", lambda pid: 380_000_000)
    found = leaks.start(stage)
    assert found.words == "6.0 and 3.0 s of CPU, 380 MB"
    assert found.holds
    assert not leaks.start(stage).holds


def test_accounting(stage, monkeypatch):
    small = dataclasses.replace(stage, pace=0.15, _encoder=stage._encoder)
    found = accounting.measure(small)
    assert found.holds, found.words
    assert found.facts["Fault"] > 5
    assert found.facts["load"] > 5
    enter = Ledger.enter
    monkeypatch.setattr(Ledger, "enter", lambda self, key, size: enter(self, key, size - 1))
    blind = accounting.measure(small)
    assert not blind.holds
    assert "device bytes" in blind.facts["off"][0]


def test_a_line_of_the_proof(stage):
    line = prove(Figure(99, "promise", lambda _: Measured("words", True, {"a": 1})), stage)
    assert line.as_dict() | {"seconds": 0, "cpu_seconds": 0} == {
        "number": 99, "promise": "promise", "measured": "words", "holds": True, "facts": {"a": 1},
        "seconds": 0, "cpu_seconds": 0,
    }  # fmt: skip
    assert len({figure.number for figure in FIGURES}) == len(FIGURES)
    assert len(ZOO) == 6


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([], 0.5) == float("inf")


def test_where_no_call_was_answered_nothing_is_timed():
    assert Outcomes(answered=[0.1, 0.2]).count == 2
    with pytest.raises(VerificationError, match=r"no call was answered \(1 refused, 0 broken\): nothing can be timed"):
        _ = Outcomes(refused=[0.1]).count


def test_a_server_that_does_not_start_is_told(tmp_path, monkeypatch):
    from bertology_serve.bench.prove import stage as module

    with (
        pytest.raises(VerificationError, match="did not start: no such thing"),
        module.serving(["sh", "-c", "echo no such thing >&2; exit 3"], {}),
    ):
        raise Overloaded("not reached")
