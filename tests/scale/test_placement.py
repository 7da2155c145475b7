"""Placement: who agrees with whom, what moves, what is bounded."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertology_serve.scale.placement import BOUND, COOL, HOLD, HOT, SLACK, WINDOW, Placement, TokenRate, ordered

NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=9, unique=True)
DELTAS = [f"delta-{number}" for number in range(2000)]


@given(NAMES, st.text(max_size=20), st.randoms())
def test_whoever_asks_gets_the_same_order(names: list[str], delta: str, shuffler: object) -> None:
    other = list(names)
    shuffler.shuffle(other)  # type: ignore[attr-defined]
    found = ordered(delta, tuple(names))
    assert found == ordered(delta, tuple(other))
    assert sorted(found) == sorted(names)


@given(NAMES, st.text(min_size=9, max_size=12), st.text(max_size=20))
def test_a_newcomer_leaves_the_order_of_the_others_alone(names: list[str], newcomer: str, delta: str) -> None:
    after = [name for name in ordered(delta, (*names, newcomer)) if name != newcomer]
    assert after == list(ordered(delta, tuple(names)))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_newcomer_moves_its_share_and_no_more(count: int) -> None:
    names = [f"http://replica-{number}:8000" for number in range(count + 1)]
    before, after = Placement(names[:-1]), Placement(names)
    moved = [delta for delta in DELTAS if before.homes(delta) != after.homes(delta)]
    assert len(moved) <= 1.3 * len(DELTAS) / (count + 1)
    assert all(after.homes(delta) == [names[-1]] for delta in moved)


def test_deltas_are_spread_evenly() -> None:
    placement = Placement(["a", "b", "c"])
    counts = Counter(placement.homes(delta)[0] for delta in DELTAS)
    assert max(counts.values()) <= 1.1 * len(DELTAS) / 3


def test_the_deltas_of_a_replica_that_is_not_ready_go_to_the_next_of_their_order() -> None:
    placement = Placement(["a", "b", "c"])
    before = {delta: placement.homes(delta) for delta in DELTAS}
    placement.replicas["b"].ready = False
    for delta in DELTAS:
        assert placement.homes(delta) == (
            [ordered(delta, ("a", "b", "c"))[1]] if before[delta] == ["b"] else before[delta]
        )
    placement.replicas["a"].ready = placement.replicas["c"].ready = False
    assert placement.begin("delta-1", 10) is None


def test_a_replica_gets_no_calls_for_deltas_that_are_stale_there() -> None:
    placement = Placement(["a", "b"])
    placement.replicas["a"].stale = {"mood"}
    assert placement.homes("mood") == ["b"]
    chosen = placement.begin("mood", 10)
    assert chosen is not None
    assert chosen.name == "b"
    assert placement.begin("mood", 10, tried={"b"}) is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 2000), st.booleans()), max_size=300), st.integers(2, 6))
def test_no_replica_has_more_than_its_bound_under_way(calls: list[tuple[int, int, bool]], count: int) -> None:
    placement = Placement([f"r{number}" for number in range(count)])
    running = []
    for delta, tokens, ends in calls:
        chosen = placement.begin(f"d{delta}", tokens)
        assert chosen is not None
        total = sum(one.load for one in placement.replicas.values())
        # the mean of what was there, the call, and at least one call or a batch each
        assert chosen.load <= max(SLACK, BOUND * total / count) or chosen.load == tokens + min(
            one.load - (tokens if one is chosen else 0) for one in placement.replicas.values()
        )
        running.append((chosen, tokens))
        if ends:
            placement.end(*running.pop(0))
    for one in running:
        placement.end(*one)
    assert all(one.load == 0 for one in placement.replicas.values())


def test_beyond_the_bound_a_replica_that_has_the_delta_is_taken() -> None:
    placement = Placement(["a", "b", "c", "d"])
    first, *others = ordered("mood", ("a", "b", "c", "d"))
    placement.replicas[first].load = 10 * SLACK
    placement.replicas[others[2]].resident = {"mood"}
    chosen = placement.begin("mood", 10)
    assert chosen is not None
    assert chosen.name == others[2]
    placement.replicas[others[2]].resident = set()
    chosen = placement.begin("mood", 10)
    assert chosen is not None
    assert chosen.name == others[0]


def ask(placement: Placement, delta: str, rate: float, start: float, seconds: float) -> float:
    """Calls of 100 tokens, evenly; the time after them."""
    calls = int(rate * seconds / 100)
    for number in range(calls):
        placement.count(delta, 100, start + seconds * number / calls)
    return start + seconds


def test_a_hot_delta_spreads_soon_and_shrinks_late() -> None:
    placement = Placement(["a", "b", "c"])
    for one in placement.replicas.values():
        one.capacity = 10_000
    now = ask(placement, "mood", 2000, 0, 30)
    assert len(placement.homes("mood")) == 1
    now = ask(placement, "mood", 40_000, now, 3)
    assert len(placement.homes("mood")) == 3, "more than all replicas are not there"
    now = ask(placement, "mood", 2000, now, HOLD / 2)
    assert len(placement.homes("mood")) == 3
    now = ask(placement, "mood", 2000, now, 12 * HOLD)
    assert len(placement.homes("mood")) == 1
    assert not placement.spread()


def test_a_delta_that_nobody_asks_any_more_shrinks_too() -> None:
    placement = Placement(["a", "b"])
    placement.replicas["a"].capacity = 1000
    now = ask(placement, "mood", 900, 0, 10)
    assert placement.spread() == {"mood": 2}
    placement.cool(now + 10)
    placement.cool(now + 10 + HOLD)
    assert placement.spread() == {}


@given(st.floats(0.01, 20), st.lists(st.floats(0.9, 1.1), min_size=200, max_size=200))
@settings(max_examples=30)
def test_rates_that_waver_by_a_tenth_do_not_make_it_waver(level: float, factors: list[float]) -> None:
    rate, seen = TokenRate(), set()
    for second, factor in enumerate(factors):
        for call in range(20):
            now = second + call / 20
            rate.add(level * factor * 1000 / 20, now)
            count = rate.settle(1000, 100, now)
        if second > 5 * HOLD * (1 + level) or second > 150:
            seen.add(count)
    assert len(seen) <= 2
    assert max(seen) - min(seen) <= 1
    assert HOT > COOL


def test_the_rate_is_that_of_the_calls() -> None:
    rate = TokenRate()
    for number in range(2000):
        rate.add(50, number / 100)
    assert rate.at(20) == pytest.approx(5000, rel=0.02)
    assert rate.at(20 + WINDOW) == pytest.approx(5000 / math.e, rel=0.02)


def test_calls_without_a_delta_go_to_the_least_busy_one() -> None:
    placement = Placement(["a", "b", "c"])
    assert Counter(placement.begin(None, 10).name for _ in range(30)) == {"a": 10, "b": 10, "c": 10}  # type: ignore[union-attr]


def test_a_thousand_replicas_share_the_deltas_and_their_order_has_no_end() -> None:
    names = tuple(f"http://replica-{number}:8000" for number in range(1000))
    placement = Placement(names)
    counts = Counter(placement.homes(delta)[0] for delta in DELTAS)
    assert len(counts) == pytest.approx(1000 * (1 - math.exp(-2)), rel=0.05)
    order = ordered("mood", names)
    for name in order[:40]:
        assert placement.homes("mood") == [name]
        placement.replicas[name].ready = False
