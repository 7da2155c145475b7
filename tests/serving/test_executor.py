from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bertology_serve.errors import DataError
from bertology_serve.serving.executor import THREAD, Executor
from bertology_serve.serving.queue import WorkQueue
from bertology_serve.serving.scheduler import FairScheduler
from bertology_serve.serving.times import BatchTimes
from tests.serving.test_scheduler import work


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
