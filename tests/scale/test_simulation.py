"""The simulation beside queueing theory, and beside the cache that it stands for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from bertology_serve.errors import FormatError
from bertology_serve.scale import simulation
from bertology_serve.scale.simulation import (
    Calls,
    Floats,
    Memory,
    ReplicaCosts,
    SimulatedFleet,
    delta_name,
    zipf_shares,
)
from bertology_serve.serving.versions.delta_cache import CHEAPEST, DeltaCache

SLOW = ReplicaCosts(((1, 0, 0.005), (100, 0, 0.5)))  # 5 ms a token: ten tokens fill a batch, which takes 50 ms
FAST = ReplicaCosts(((1, 1, 0.0021), (1000, 1000, 0.102)), call_seconds=0.001, load_seconds=0.02, lift_seconds=0.002)


def waits(tokens: Floats, rate: float) -> float:
    """Seconds that calls of those lengths wait on average for one server, beside their own batch."""
    due = np.random.default_rng(1).exponential(1 / rate, len(tokens)).cumsum()
    found = SimulatedFleet(1, SLOW).run(Calls(due, np.zeros(len(tokens), np.int64), tokens.astype(np.int64)))
    return float((found.latency - 0.005 * tokens).mean())


def test_one_call_a_batch_waits_as_in_an_m_d_1_queue() -> None:
    load, service = 0.6, 0.05
    assert waits(np.full(30_000, 10.0), load / service) == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)


def test_calls_of_several_lengths_wait_as_pollaczek_and_khinchine_say() -> None:
    tokens = np.random.default_rng(0).choice([10.0, 30.0], 30_000)  # two of them are more than a batch
    service, rate = 0.005 * tokens, 6.0
    expected = rate * (service**2).mean() / (2 * (1 - rate * service.mean()))
    assert waits(tokens, rate) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("clients", [1, 2, 16])
def test_clients_that_wait_for_their_answers_obey_little(clients: int) -> None:
    shares = zipf_shares(5, 1.0)
    found = SimulatedFleet(1, FAST).run(Calls.drawn(1.0, 2000, shares, 20, clients=clients)).after(0.2)
    assert found.throughput * found.latency.mean() == pytest.approx(clients, rel=0.02)
    if clients == 1:
        assert found.latency.min() > FAST.call_seconds + 0.002
        assert found.latency.mean() == pytest.approx(0.001 + 0.002 + 20 * 1e-4, rel=0.02)


def lru_hit_rate(shares: Floats, room: int) -> float:
    """Che, Tung & Wang (2002): an entry is there if it was asked within the time in which ``room`` others were."""

    def there(seconds: float) -> Floats:
        return 1 - np.exp(-shares * seconds)

    seconds = brentq(lambda seconds: there(seconds).sum() - room, 1.0, 1e9)
    return float((shares * there(seconds)).sum())


@pytest.mark.parametrize("exponent", [0.7, 1.1])
def test_memory_does_better_than_lru_and_no_better_than_knowing_what_is_asked(exponent: float) -> None:
    shares, room = zipf_shares(400, exponent), 40
    fleet = SimulatedFleet(1, ReplicaCosts(((1, 1, 1e-5), (1000, 1000, 2e-3))), Memory(room))
    hits = fleet.run(Calls.drawn(100.0, 20_000, shares, 20)).after(0.3).hit.mean()
    assert lru_hit_rate(shares, room) - 0.01 <= hits <= shares[:room].sum() + 0.01
    assert lru_hit_rate(shares, room) + 0.02 < shares[:room].sum(), "else the bounds say nothing"


class Bank:
    """What ``DeltaCache`` asks of an encoder's deltas."""

    def __init__(self) -> None:
        self.there: dict[str, Any] = {}

    @property
    def ledger(self) -> Any:
        return SimpleNamespace(total=sum(one.bytes for one in self.there.values()))

    def resident(self, name: str) -> Any:
        return self.there.get(name)

    def resident_bytes(self, delta: Any) -> int:
        return int(delta.bytes)

    def reserve(self, delta: Any) -> str:
        return str(delta.name)

    def add(self, delta: Any, beside: bool, key: str) -> None:
        self.there[key] = delta

    def evict(self, name: str) -> bool:
        return self.there.pop(name, None) is not None


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12), max_size=80), st.integers(5, 30), st.integers(0, 30))
def test_what_leaves_memory_is_what_leaves_a_servers(asked: list[int], device: int, host: int) -> None:
    memory, bank = Memory(device, host, (1, 5, 2, 3, 4)), Bank()
    replica = next(iter(SimulatedFleet(1, FAST, memory).replicas.values()))
    tiers = DeltaCache(bank, lambda card: card, device, host, clock=lambda: 0.0)  # type: ignore[arg-type, return-value]
    for rank in range(13):
        name = delta_name(rank)
        tiers.register(SimpleNamespace(name=name, version="1", bytes=memory.size(name)))  # type: ignore[arg-type]
    # the same cost: of another, rounding breaks ties otherwise
    with mock.patch.object(simulation, "COST", CHEAPEST):
        for rank in asked:
            name = delta_name(rank)
            if bank.resident(name):
                tiers.touch([name])
                replica.device.touch(name)
            else:
                tiers.raise_up(name)
                assert replica.make_resident(name)
            assert set(replica.device) == set(bank.there) == replica.state.resident
            assert {f"{name}/1" for name in replica.host} == set(tiers._host)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0, 0.05), st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_every_call_ends_once_and_nothing_is_left(
    asked: list[tuple[float, int, int]], replicas: int, room: int, clients: int
) -> None:
    gaps, ranks, tokens = (np.array(column) for column in zip(*asked, strict=True))
    fleet = SimulatedFleet(replicas, FAST, Memory(room, 2))
    ended: list[int] = []
    end = fleet.end
    fleet.end = lambda call, seconds: (ended.append(call.number), end(call, seconds))[1]  # type: ignore[method-assign]
    found = fleet.run(Calls(gaps.cumsum(), ranks, tokens, clients))
    assert sorted(ended) == list(range(len(asked)))
    answered = ~np.isnan(found.latency)
    assert (found.latency[answered] > 0.002 + 1e-4 * tokens[answered]).all()
    assert found.busy <= replicas * found.seconds
    for one in fleet.replicas.values():
        assert one.device.used <= room
        assert (one.state.load, len(one.held), len(one.flights), one.queue.items) == (0, 0, 0, 0)


def test_what_has_been_so_for_long_is_so_at_the_start() -> None:
    fleet, shares = SimulatedFleet(3, FAST, Memory(20)), zipf_shares(400, 1.2)
    fleet.settle(shares, tokens=4 * fleet.times.rate)
    assert fleet.placement.spread()[delta_name(0)] > 1
    for name in fleet.placement.homes(delta_name(0)):
        assert delta_name(0) in fleet.replicas[name].device
    assert sum(len(one.device) for one in fleet.replicas.values()) > 50


def test_a_hot_delta_has_all_replicas_and_more_than_they_can_do_is_refused() -> None:
    one_delta, whole = zipf_shares(1, 1.0), SimulatedFleet(1, FAST).times.rate / 20
    found = SimulatedFleet(3, FAST).run(Calls.drawn(2 * whole, 20_000, one_delta, 20)).after(0.5)
    assert (found.refused, found.milliseconds[0] < 200) == (0, True)
    assert SimulatedFleet(1, FAST).run(Calls.drawn(2 * whole, 20_000, one_delta, 20)).after(0.5).refused > 0.3


@pytest.mark.parametrize(
    "values", [{"ladder": ()}, {"call_seconds": -1.0}, {"load_seconds": math.nan}, {"rank_bytes": 0}]
)
def test_calibrations_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="numbers from 0"):
        ReplicaCosts(**{"ladder": SLOW.ladder, **values})
