from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import pytest

from bertology_serve.errors import Overloaded, RateLimited
from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import FairScheduler, ItemState
from tests.serving.batching.test_scheduler import work
from tests.serving.running import wait


def queue(limit: int = 100, budget: int = 10, rate: float = 1e6, **options: Any) -> WorkQueue:
    """Batches of exactly ``budget`` tokens, ``rate`` of them a second."""
    times = BatchTimes(1e9, budget, [(1, 1, 1 / rate), (2, 2, 2 / rate)])
    return WorkQueue(FairScheduler(budget), times, limit, clock=lambda: 5.0, **options)


def test_counts_what_waits():
    made = queue()
    made.put([work(4), work(7)])
    assert (made.items, made.tokens) == (2, 11)
    batch = made.take()
    assert [one.cost for one in batch] == [4]
    assert batch[0].arrived == 5.0
    assert batch[0].state is ItemState.TAKEN
    assert (made.items, made.tokens) == (1, 7)


def test_a_call_that_does_not_fit_is_refused_whole_and_told_when_to_come_back():
    made = queue(limit=10, rate=2.0)
    made.put([work(8)])
    with pytest.raises(Overloaded, match="8 of 10 tokens wait, 3 more are not taken now; try again in 4 s") as refused:
        made.put([work(1), work(2)])
    assert refused.value.retry_after == 4.0
    assert made.items == 1


def test_a_full_queue_takes_nothing_until_an_eighth_of_it_is_free():
    made = queue(limit=80, budget=5)
    made.put([work(5) for _ in range(15)])
    made.check()
    with pytest.raises(Overloaded):
        made.put([work(6)])
    with pytest.raises(Overloaded, match="75 of 80 tokens wait, 0 more are not taken now"):
        made.check()
    made.take()
    made.check()
    made.put([work(10)])
    assert made.tokens == 80


def test_a_call_that_is_too_large_for_what_is_left_does_not_shut_the_queue():
    made = queue(limit=80)
    made.put([work(50)])
    with pytest.raises(Overloaded):
        made.put([work(31)])
    made.put([work(30)])


def test_a_delta_whose_queue_is_full_waits_for_an_eighth_and_others_do_not():
    made = queue(limit=1000, budget=5, max_delta_tokens=40)
    made.put([work(4, "flood") for _ in range(10)])
    with pytest.raises(RateLimited):
        made.check({"flood": 1})
    made.take()
    with pytest.raises(RateLimited, match="36 of 40 tokens wait, 4 more"):
        made.check({"flood": 4})
    made.check({"light": 40})
    made.take()
    made.check({"flood": 4})


def test_retry_after_is_between_a_second_and_a_minute():
    for rate, seconds in ((1e8, 1.0), (1e-8, 60.0)):
        made = queue(limit=10, rate=rate)
        made.put([work(8)])
        with pytest.raises(Overloaded) as refused:
            made.put([work(8)])
        assert refused.value.retry_after == seconds


def test_dropping_makes_room_and_is_counted_once():
    made = queue(limit=10)
    first = work(8)
    made.put([first])
    assert made.cancel([first]) == 1
    assert made.cancel([first]) == 0
    assert (made.items, made.tokens) == (0, 0)
    second = work(9)
    made.put([second])
    assert made.take() == [second]
    assert made.cancel([second]) == 0


def test_take_waits_for_work():
    made, found = queue(), []
    thread = threading.Thread(target=lambda: found.append(made.take()))
    thread.start()
    late = work(1)
    made.put([late])
    thread.join(120)
    assert found == [[late]]


def test_one_call_of_several_batches_wakes_as_many_takers():
    made, found = queue(budget=4), SimpleQueue()
    for _ in range(3):
        threading.Thread(target=lambda: found.put(made.take()), daemon=True).start()
    wait(lambda: len(made._changed._waiters) == 3)
    items = [work(4) for _ in range(3)]
    made.put(items)
    taken = [found.get(timeout=60) for _ in items]
    assert sorted(id(one) for batch in taken for one in batch) == sorted(map(id, items))
    assert [len(batch) for batch in taken] == [1, 1, 1]


def test_a_closed_queue_hands_out_the_rest_and_takes_no_more():
    made, rest = queue(), work(1)
    made.put([rest])
    made.close()
    with pytest.raises(Overloaded, match="stopping"):
        made.put([work(1)])
    assert made.take() == [rest]
    assert made.take() == []


def test_many_threads_lose_nothing():
    made, taken = queue(limit=10**9, budget=7), []
    works = [[work(1 + i % 3) for i in range(50)] for _ in range(4)]
    takers = [threading.Thread(target=lambda: taken.extend(_drain(made))) for _ in range(2)]
    putters = [threading.Thread(target=lambda mine=mine: [made.put([one]) for one in mine]) for mine in works]
    for thread in (*takers, *putters):
        thread.start()
    for thread in putters:
        thread.join(120)
    made.close()
    for thread in takers:
        thread.join(120)
    assert sorted(map(id, taken)) == sorted(id(one) for mine in works for one in mine)
    assert (made.items, made.tokens) == (0, 0)


def _drain(made: WorkQueue) -> list:
    found = []
    while batch := made.take():
        found += batch
    return found


def test_one_delta_cannot_fill_the_queue():
    made = queue(limit=100, rate=1.0, max_delta_tokens=20)
    made.put([work(15, "flood"), work(5, "flood")])
    with pytest.raises(
        RateLimited, match="queue of delta 'flood' is full: 20 of 20 tokens wait, 1 more are not taken now"
    ):
        made.put([work(1, "flood")])
    made.put([work(10, "light")])
    with pytest.raises(RateLimited) as refused:
        made.put([work(1, "light"), work(1, "flood")])
    assert refused.value.retry_after == 30.0  # no longer than all that waits takes, and at half the service
    assert (made.items, made.tokens) == (3, 30)


def test_batches_follow_the_time_that_they_take():
    made = WorkQueue(FairScheduler(100), BatchTimes(0.1, 100, [(10, 10, 0.01), (100, 100, 0.1)]), 10_000)
    for _ in range(200):
        made.served([work(100)], 0.2)
    made.put([work(1) for _ in range(100)])
    assert 45 <= len(made.take()) <= 55


def test_expired_work_is_never_handed_out():
    made = queue()
    late, good = work(4, deadline=5.0), work(4, deadline=5.1)
    made.put([late, good])
    assert made.take() == [good]
    assert late.state is ItemState.CANCELLED
    assert (made.items, made.tokens) == (0, 0)
    assert made.cancel([late]) == 0
