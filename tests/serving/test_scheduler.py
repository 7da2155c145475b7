from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.serving.scheduler import OldestFirst
from bertology_serve.serving.work import State, Work


def work(cost: int, delta: str = "d") -> Work:
    job: Any = SimpleNamespace(cost=cost, request=SimpleNamespace(delta=delta))
    ticket: Any = None
    return Work(job, ticket, 0)


def scheduler(costs: list[int], budget: int) -> tuple[OldestFirst, list[Work]]:
    made, works = OldestFirst(budget), [work(cost) for cost in costs]
    for one in works:
        made.push(one, 0.0)
    return made, works


def test_a_batch_takes_the_oldest_up_to_the_budget():
    made, works = scheduler([4, 4, 4, 1], 10)
    assert made.pick(0.0) == works[:2]
    assert made.pick(0.0) == works[2:]
    assert made.pick(0.0) == []


def test_nothing_is_overtaken_by_what_would_fit():
    made, works = scheduler([6, 6, 1], 10)
    assert made.pick(0.0) == works[:1]


def test_work_beyond_the_budget_goes_alone():
    made, works = scheduler([50, 1], 10)
    assert made.pick(0.0) == works[:1]
    assert made.pick(0.0) == works[1:]


def test_dropped_work_is_forgotten():
    made, works = scheduler([4, 4, 4], 10)
    works[0].state = works[2].state = State.DROPPED
    assert made.pick(0.0) == [works[1]]
    assert made.pick(0.0) == []


def test_one_batch_mixes_deltas():
    made, works = OldestFirst(10), [work(1, "a"), work(1, "b")]
    for one in works:
        made.push(one, 0.0)
    assert {one.delta for one in made.pick(0.0)} == {"a", "b"}


@given(st.lists(st.integers(1, 30)), st.integers(1, 40))
def test_everything_comes_out_once_in_order_within_the_budget(costs, budget):
    made, works = scheduler(costs, budget)
    out = []
    while batch := made.pick(0.0):
        assert len(batch) == 1 or sum(one.cost for one in batch) <= budget
        out += batch
    assert out == works
