from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.encoder.bank import BARE, NEVER, BankEntry
from bertology_serve.encoder.pipeline import Request
from bertology_serve.serving.batching.scheduler import (
    CallContext,
    CallItem,
    DeltaQueue,
    FairScheduler,
    ItemState,
    Twins,
)
from bertology_serve.tasks.spec import Encoding


def work(cost: int, delta: str = "d", deadline: float = math.inf, priority: int = 0) -> CallItem:
    ready: Any = SimpleNamespace(delta=SimpleNamespace(version="1"), entry=BARE)
    made = CallItem(Request(delta, {}), ready, CallContext(), deadline, priority)
    made.cost, made.charged, made.encodings = cost, cost, ()
    return made


def scheduler(works: list[CallItem], budget: int, **weights: float) -> FairScheduler:
    made = FairScheduler(budget, weights)
    for one in works:
        made.push(one)
    return made


def test_a_batch_takes_the_oldest_up_to_the_budget():
    works = [work(cost) for cost in (4, 4, 4, 1)]
    made = scheduler(works, 10)
    assert made.pick(0.0) == works[:2]
    assert made.pick(0.0) == works[2:]
    assert made.pick(0.0) == []


def test_nothing_is_overtaken_by_what_would_fit():
    works = [work(6), work(6), work(1)]
    assert scheduler(works, 10).pick(0.0) == works[:1]


def test_work_beyond_the_budget_goes_alone():
    works = [work(50), work(1)]
    made = scheduler(works, 10)
    assert made.pick(0.0) == works[:1]
    assert made.pick(0.0) == works[1:]


def test_long_sequences_fill_a_batch_sooner():
    works = [work(4), work(4), work(1)]
    works[1].squares = 100
    made = scheduler(works, 10)
    made.bend = 0.05
    assert made.pick(0.0) == works[:1]
    assert made.pick(0.0) == works[1:]


def test_the_earliest_deadline_of_a_delta_goes_first():
    late, soon, whenever = work(1, deadline=9.0), work(1, deadline=3.0), work(1)
    assert scheduler([whenever, late, soon], 10).pick(0.0) == [soon, late, whenever]


def test_only_work_that_can_wait_makes_batches_beyond_the_cap():
    """A second a token, at most 10 tokens, 4 where a deadline is near."""

    def picked(*deadlines: float) -> int:
        made = scheduler([work(1, deadline=one) for one in deadlines], 10)
        made.hurried, made.seconds = 4, lambda size: size
        return len(made.pick(100.0))

    assert picked(*[math.inf] * 20) == picked(*[110.0] * 20) == 10
    assert picked(*[107.5] * 20) == 7
    assert picked(*[102.0] * 20) == picked(102.0, *[math.inf] * 19) == 4  # no smaller: nothing would be in time


def test_dropped_and_expired_work_is_forgotten_and_costs_its_delta_nothing():
    works = [work(4), work(4), work(4, deadline=1.0)]
    made = scheduler(works, 10)
    made.cancel(works[0])
    assert made.pick(2.0) == [works[1]]
    assert made.pick(2.0) == []
    assert [one.state for one in works] == [ItemState.CANCELLED, ItemState.TAKEN, ItemState.CANCELLED]
    assert (made.total.items, made.total.tokens) == (0, 0)


def test_one_batch_mixes_deltas():
    works = [work(1, name) for name in "abcabc"]
    assert {one.delta for one in scheduler(works, 3).pick(0.0)} == {"a", "b", "c"}


def test_a_flood_does_not_hold_up_who_comes_after_it():
    made = scheduler([work(5, "flood") for _ in range(100)], 20)
    made.pick(0.0)
    light = work(5, "light")
    made.push(light)
    assert light in made.pick(0.0)


def test_weights_share_the_service():
    made = scheduler([work(1, name) for name in "ab" for _ in range(400)], 100, a=3.0)
    first = [one.delta for _ in range(2) for one in made.pick(0.0)]
    assert first.count("a") == 150
    assert made.share("a") == 0.75
    assert made.share("c") == 0.2


def test_idling_earns_no_credit():
    """A delta that comes back after others were served for long shares with them, and does not catch up."""
    made = scheduler([work(1, "busy") for _ in range(1000)], 100)
    early = work(1, "idle")
    made.push(early)
    for _ in range(4):
        made.pick(0.0)
    for _ in range(100):
        made.push(work(1, "idle"))
    batch = [one.delta for one in made.pick(0.0)]
    assert 49 <= batch.count("idle") <= 51


def test_leaving_and_coming_back_forgives_nothing():
    made = scheduler([work(1, "steady") for _ in range(200)], 10)
    for _ in range(5):
        made.push(work(9, "greedy"))
        made.pick(0.0)
    counters = made.counters()
    made.push(work(9, "greedy"))
    assert made.counters()["greedy"] >= counters["steady"]


def test_memory_is_bounded_by_what_waits():
    """Callers who leave, and deltas that nobody asks for any more, leave nothing behind while others wait."""
    made = scheduler([work(1, "steady", deadline=0.5) for _ in range(10_000)], 1)
    for number in range(2000):
        gone = work(1, "steady", deadline=9.0)
        once = work(1, f"once-{number}")
        for one in (gone, once):
            made.push(one)
        made.cancel(gone)
        if number % 2:
            made.cancel(once)
        else:
            while once.state is ItemState.WAITING:
                made.pick(0.0)
    assert len(made.queues) == 1
    assert len(made._spent) < 100
    assert len(made.queues["steady"]._heap) <= 2 * made.total.items + 17


NAMES = ("a", "b", "c", "d")
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from(NAMES), st.integers(1, 30), st.sampled_from([1.0, 4.0, math.inf])),
        st.tuples(st.just("pick")),
        st.tuples(st.just("drop"), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.floats(0.1, 2.0)),
    ),
    max_size=150,
)


class Watch:
    """Independent book-keeping: what waits, and the service that each delta has had."""

    def __init__(self, budget: int) -> None:
        self.made, self.budget, self.now = FairScheduler(budget, WEIGHTS), budget, 0.0
        self.waiting: list[CallItem] = []
        self.service = dict.fromkeys(NAMES, 0.0)
        self.since: dict[tuple[str, str], tuple[float, float]] = {}
        self.unit = 0.0

    def push(self, name: str, cost: int, allowed: float) -> None:
        one = work(cost, name, self.now + allowed)
        self.unit = max(self.unit, cost / WEIGHTS.get(name, 1.0))
        self.made.push(one)
        self.waiting.append(one)

    def pick(self) -> None:
        live = [one for one in self.waiting if one.deadline > self.now]
        batch = self.made.pick(self.now)
        assert bool(batch) == bool(live), "it works whenever there is work"
        assert len(batch) <= 1 or sum(one.cost for one in batch) <= self.budget
        for one in batch:
            assert one in live
            self.service[one.delta] += one.cost / WEIGHTS.get(one.delta, 1.0)
        for name in NAMES:
            taken = [one.deadline for one in batch if one.delta == name]
            left = [one.deadline for one in live if one.delta == name and one not in batch]
            assert taken == sorted(taken)
            assert not taken or not left or max(taken) <= min(left)
        self.waiting = [one for one in live if one not in batch]

    def drop(self, index: int) -> None:
        waiting = [one for one in self.waiting if one.state is ItemState.WAITING]
        if index < len(waiting):
            self.made.cancel(waiting[index])
            self.waiting.remove(waiting[index])

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def check(self) -> None:
        counters = self.made.counters()
        assert not counters or max(counters.values()) - min(counters.values()) <= self.unit + 1e-6
        for pair in [(one, other) for one in NAMES for other in NAMES if one < other]:
            both = (self.service[pair[0]], self.service[pair[1]])
            if not all(any(one.delta == name and one.deadline > self.now for one in self.waiting) for name in pair):
                self.since.pop(pair, None)
                continue
            start = self.since.setdefault(pair, both)
            assert abs((both[0] - start[0]) - (both[1] - start[1])) <= 2 * self.unit + 1e-6


@given(STEPS, st.integers(1, 60))
def test_the_bound_of_fairness_is_never_broken(steps, budget):
    watch = Watch(budget)
    for name, *arguments in steps:
        getattr(watch, name)(*arguments)
        watch.check()
    while watch.waiting:
        watch.pick()
        watch.check()
    assert (watch.made.total.items, watch.made.total.tokens) == (0, 0)


def test_the_watch_sees_an_unfair_scheduler(monkeypatch):
    """Taking turns without a look at the costs breaks the bound."""
    monkeypatch.setattr(DeltaQueue, "counter", property(lambda queue: 0.0, lambda queue, value: None))
    watch = Watch(5)
    for cost, name in ((1, "a"), (30, "b")):
        for _ in range(100):
            watch.push(name, cost, math.inf)
    watch.check()
    with pytest.raises(AssertionError):
        pick_and_check(watch, 20)


def pick_and_check(watch: Watch, times: int) -> None:
    for _ in range(times):
        watch.pick()
        watch.check()


def test_priorities_order_one_delta_s_work_and_change_no_shares():
    works = [work(1, "a", 9.0), work(1, "a", 8.0, priority=7), work(1, "a", 9.0, priority=1), work(1, "b", 9.0)]
    made = scheduler(works, 1)
    assert [made.pick(0.0)[0] for _ in works] == [works[2], works[3], works[0], works[1]]


# Items of one call about one text: three deltas, of whose six layers they change all, the upper two, none.

LAYERS = 6
LOWEST = {"all": 0, "upper": 4, "other": 4, "probe": NEVER}


def twins(names: Sequence[str], tokens: int = 12, text: int = 0) -> list[CallItem]:
    """As ``Service`` makes them."""
    made, call = [], Twins(LAYERS)
    for name in names:
        ready: Any = SimpleNamespace(
            delta=SimpleNamespace(version="1"), entry=BankEntry(name, lowest=LOWEST[name]), prompt_length=0
        )
        one = CallItem(Request(name, {}), ready, CallContext())
        one.take([Encoding((2, 5 + text, *range(tokens - 3), 3), (0,) * tokens)])
        call.add(one)
        made.append(one)
    return made


def test_a_call_is_charged_for_the_rows_that_are_computed():
    assert [one.charged for one in twins(["probe", "upper", "other", "all"])] == [12, 4, 4, 12]
    assert [one.charged for one in twins(["upper", "probe", "other"])] == [12, 4, 4]  # the probe adds two layers
    assert [one.charged for one in twins(["probe", "probe", "upper", "upper"])] == [12, 1, 4, 1]  # one row is left


def test_twins_go_into_one_batch_out_of_turn():
    asked = twins(["probe", "upper", "other"])
    others = [work(3, "busy") for _ in range(10)]
    made = FairScheduler(40, depth=LAYERS)
    for one in [asked[0], *others, *asked[1:]]:
        made.push(one)
    batch = made.pick(0.0)
    assert [one for one in batch if one in asked] == asked
    assert sum(one.charged for one in batch) <= 40 < sum(one.cost for one in batch) + 12
    assert made.total.tokens == sum(one.charged for one in others if one not in batch)
    while made.pick(0.0):
        pass
    assert (made.total.items, made.total.tokens, made.queues) == (0, 0, {})


def test_twins_that_do_not_fit_wait_and_are_charged_then():
    asked = twins(["all", "probe", "upper"])
    made = FairScheduler(24, depth=LAYERS)
    for one in asked:
        made.push(one)
    assert made.pick(0.0) == asked[:2]  # 12 rows of its own each: nothing below the first layer is shared with "all"
    assert [one.charged for one in asked[:2]] == [12, 12]
    assert made.pick(0.0) == asked[2:]
    assert asked[2].charged == 12


def test_equal_texts_of_different_calls_share_too():
    first, second = twins(["probe"]), twins(["upper"])
    made = FairScheduler(100, depth=LAYERS)
    for one in (*first, *second):
        made.push(one)
    assert made.pick(0.0) == [*first, *second]
    assert [one.charged for one in (*first, *second)] == [12, 4]


@given(st.lists(st.tuples(st.lists(st.sampled_from(sorted(LOWEST)), min_size=1, max_size=5), st.integers(0, 3)),
                max_size=12), st.integers(5, 60))  # fmt: skip
def test_with_twins_everything_is_picked_once_and_nothing_is_left(calls, budget):
    made = FairScheduler(budget, depth=LAYERS)
    pushed = [one for names, text in calls for one in twins(names, text=text)]
    for one in pushed:
        made.push(one)
    seen: list[CallItem] = []
    while batch := made.pick(0.0):
        assert len(batch) == 1 or sum(one.size(0.0, one.spared) for one in batch) <= budget
        counters = made.counters()
        assert all(name in made.queues for name in counters)
        seen += batch
    assert sorted(map(id, seen)) == sorted(map(id, pushed))
    assert (made.total.items, made.total.tokens, made.queues) == (0, 0, {})
