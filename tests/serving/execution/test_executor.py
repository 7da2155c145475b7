from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bertology_serve.encoder.bank import BARE
from bertology_serve.errors import Crashed, DataError
from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import FairScheduler
from bertology_serve.serving.execution.executor import FIRST, LONGEST, THREAD, Executor, Quarantine
from tests.serving.batching.test_scheduler import work
from tests.serving.running import wait


class Harness:
    """An executor over costs as jobs: the answer to a job is its cost; ``bad`` costs raise."""

    def __init__(self, bad: dict[int, Exception] | None = None, short: bool = False) -> None:
        self.bad, self.short = bad or {}, short
        self.batches: list[list[int]] = []
        self.outcomes: dict[int, Any] = {}
        self.observed: list[int] = []
        self.queue = WorkQueue(FairScheduler(100), BatchTimes(1.0, 100), 1000)
        self.executor = Executor(self.queue, self.run, self.deliver, lambda batch, _: self.observed.append(len(batch)))

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        costs = [job.cost for job in jobs]
        self.batches.append(costs)
        for cost in costs:
            if cost in self.bad:
                raise self.bad[cost]
        return costs[:-1] if self.short and len(costs) > 1 else costs

    def deliver(self, batch: Sequence[Any], outcomes: Sequence[Any]) -> None:
        assert threading.current_thread().name == "executor"
        self.outcomes |= {work.cost: outcome for work, outcome in zip(batch, outcomes, strict=True)}

    def go(self, *costs: int) -> None:
        self.queue.put([work(cost) for cost in costs])
        self.executor.start()
        assert self.executor.stop(10)


def test_one_batch_answers_all():
    made = Harness()
    made.go(1, 2, 3)
    assert made.outcomes == {1: 1, 2: 2, 3: 3}
    assert (made.batches, made.observed) == ([[1, 2, 3]], [3])


def test_one_bad_job_spoils_no_other():
    problem = ValueError("secret text")
    made = Harness({2: problem})
    made.go(1, 2, 3)
    assert made.outcomes == {1: 1, 2: problem, 3: 3}
    assert made.batches == [[1, 2, 3], [1], [2], [3]]


def test_a_run_that_forgets_an_answer_is_a_failed_run():
    made = Harness(short=True)
    made.go(1, 2)
    assert made.outcomes == {1: 1, 2: 2}


def test_failures_are_logged_without_their_text(caplog):
    made = Harness({2: ValueError("secret text"), 3: DataError("another secret")})
    with caplog.at_level(logging.ERROR):
        made.go(1, 2, 3)
    assert "ValueError at" in caplog.text
    assert "secret" not in caplog.text


def test_stop_before_start_and_a_stop_that_takes_too_long():
    idle = Harness()
    assert idle.executor.stop(1)
    waits, made = threading.Event(), Harness()
    made.run = lambda jobs: [waits.wait(10)] * len(jobs)
    executor = Executor(made.queue, made.run, made.deliver, lambda *_: None)
    made.queue.put([work(1)])
    executor.start()
    assert not executor.stop(0.05)
    waits.set()
    assert executor.stop(10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_knows_the_thread_by_its_name():
    names: list[str] = []
    made = Harness()
    made.executor._observe = lambda *_: names.append(
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()
    )
    made.go(1)
    assert names == [THREAD]


class Ready:
    """What a job's delta is, as far as the executor cares."""

    def __init__(self, name: str) -> None:
        self.delta, self.entry = SimpleNamespace(name=name, version="1"), BARE


class Fragile(Harness):
    """Ends with the batches that are due to crash, counted from 0; ``poison`` deltas crash always."""

    def __init__(self, crashes: tuple[int, ...] = (), poison: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.crashes, self.poison = crashes, poison
        self.readies: dict[str, Any] = {}

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        number = len(self.batches)
        found = super().run(jobs)
        if number in self.crashes or any(job.request.delta in self.poison for job in jobs):
            raise Crashed("ended")
        return found

    def put(self, *works: tuple[int, str]) -> None:
        made = [work(cost, delta) for cost, delta in works]
        for one in made:
            one.ready = self.readies.setdefault(one.delta, Ready(one.delta))
        self.queue.put(made)


def test_what_the_executor_ended_on_runs_once_more_each_delta_by_itself():
    made = Fragile(crashes=(0,))
    made.put((1, "a"), (2, "b"), (3, "a"))
    made.go()
    assert made.outcomes == {1: 1, 2: 2, 3: 3}
    assert sorted(made.batches[0]) == [1, 2, 3]
    assert sorted(map(sorted, made.batches[1:])) == [[1, 3], [2]]


def test_poison_is_set_aside_and_spoils_no_other(caplog):
    made = Fragile(poison=("poison",))
    made.executor.quarantine = Quarantine(lambda: 0.0)
    made.put((1, "a"), (2, "poison"), (3, "a"))
    made.executor.start()
    wait(lambda: len(made.outcomes) == 3)
    assert isinstance(made.outcomes[2], Crashed)
    assert (made.outcomes[1], made.outcomes[3]) == (1, 3)
    assert "delta poison, version 1, is set aside for 10 s" in caplog.text
    batches = len(made.batches)
    made.put((4, "poison"))
    wait(lambda: 4 in made.outcomes)
    assert "it is set aside for 10 s: try then, or load another version" in str(made.outcomes[4])
    assert made.outcomes[4].retry_after == FIRST
    assert len(made.batches) == batches, "no batch was spent on it"
    made.readies.pop("poison")
    made.poison = ()
    made.put((5, "poison"))
    assert made.executor.stop(10)
    assert made.outcomes[5] == 5, "loaded anew, it is tried again"


def test_an_end_after_an_ordinary_failure():
    made, problem = Fragile(crashes=(1,)), ValueError("bad")
    made.bad = {3: problem}
    made.put((1, "a"), (3, "a"))
    made.go()
    assert made.batches == [[1, 3], [1], [1], [3]]
    assert made.outcomes == {1: 1, 3: problem}


def test_each_time_longer_and_then_free_again():
    now = [0.0]
    made, ready = Quarantine(lambda: now[0]), Ready("a")
    assert made.refusal(ready) is None
    seconds = []
    for _ in range(8):
        seconds.append(made.put(ready).retry_after)
        now[0] += seconds[-1] - 0.5
        assert made.refusal(ready).retry_after == pytest.approx(0.5)
        now[0] += 0.5
        assert made.refusal(ready) is None
    assert seconds == [FIRST * 2**n for n in range(6)] + [LONGEST] * 2
    del ready
    assert not made._until
