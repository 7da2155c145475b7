from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bertology_serve.errors import Overloaded
from bertology_serve.serving.execution import executor_handle
from bertology_serve.serving.execution.channel import Lost
from bertology_serve.serving.execution.executor_handle import Supervisor, WorkerPlace
from tests.serving.running import wait


class FakeLine:
    """Lives until it is killed."""

    def __init__(self, pid: int) -> None:
        self.pid, self.dead, self.closed = pid, threading.Event(), False

    def outlive(self) -> None:
        self.dead.wait(20)

    def kill(self) -> None:
        self.dead.set()

    def close(self) -> None:
        self.closed = True


class FakeNursery:
    """Forks lines; the first ``fails`` attempts after the first one come to nothing."""

    def __init__(self, fails: int = 0) -> None:
        self.lines: list[FakeLine] = []
        self.fails, self.may_fork = fails, threading.Event()
        self.may_fork.set()

    def fork(self, place: WorkerPlace) -> FakeLine:
        assert self.may_fork.wait(20)
        if self.lines and self.fails:
            self.fails -= 1
            raise Lost("stillborn")
        self.lines.append(FakeLine(len(self.lines)))
        return self.lines[-1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(executor_handle, "PAUSES", (0.0, 0.01))


@pytest.fixture
def made() -> Iterator[Any]:
    started: list[Supervisor] = []

    def start(nursery: Any, restore: Any = lambda line: None) -> Supervisor:
        one = Supervisor(nursery, WorkerPlace("cpu", 1), restore)
        started.append(one)
        one.start()
        return one

    yield start
    for one in started:
        one.close()


def test_one_that_ends_is_replaced_and_the_next_is_told(made):
    nursery, told = FakeNursery(), []
    keeper = made(nursery, lambda line: told.append(line.pid))
    assert (keeper.pid, keeper.restarts, keeper.is_up) == (0, 0, True)
    nursery.lines[0].dead.set()
    wait(lambda: keeper.restarts == 1)
    assert keeper.line().pid == 1
    assert told == [0, 1]
    assert nursery.lines[0].closed


def test_what_watches_over_them_is_watched_over_itself(made, caplog, monkeypatch):
    nursery = FakeNursery()
    keeper, closed = made(nursery), FakeLine.close

    def fail(line: FakeLine) -> None:
        monkeypatch.setattr(FakeLine, "close", closed)
        raise OSError("nobody foresaw this")

    monkeypatch.setattr(FakeLine, "close", fail)
    nursery.lines[0].dead.set()
    wait(lambda: keeper.restarts == 1)
    assert keeper.pid == 1
    assert keeper._background.works["supervisor"].faults == 1
    assert "supervisor ended (OSError at" in caplog.text


def test_closing_does_not_wait_for_a_fork_server_that_hangs(made, monkeypatch):
    monkeypatch.setattr(executor_handle, "CLOSE_SECONDS", 0.05)
    nursery = FakeNursery()
    keeper = made(nursery)
    nursery.may_fork.clear()
    nursery.lines[0].dead.set()
    wait(lambda: not keeper.is_up)
    keeper.close()
    assert keeper._thread.is_alive()
    nursery.may_fork.set()
    keeper._thread.join(120)
    assert all(line.dead.is_set() for line in nursery.lines)


def test_it_goes_on_trying(made, caplog):
    nursery, refusals = FakeNursery(fails=3), [Lost("does not say hello")]

    def restore(line: FakeLine) -> None:
        if line.pid == 1 and refusals:
            raise refusals.pop()

    keeper = made(nursery, restore)
    keeper.lost(keeper.line())
    wait(lambda: keeper.restarts == 1)
    assert caplog.text.count("trying again") == 4
    assert keeper.pid == 2


def test_who_asks_meanwhile_waits_for_so_long(made):
    nursery = FakeNursery()
    keeper = made(nursery)
    nursery.may_fork.clear()
    keeper.lost(keeper.line())
    assert not keeper.is_up
    with pytest.raises(Overloaded, match="does not come up"):
        keeper.line(0.05)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(keeper.line()))
    thread.start()
    nursery.may_fork.set()
    thread.join(120)
    assert found[0].pid == 1


def test_losing_what_was_replaced_already_changes_nothing(made):
    nursery = FakeNursery()
    keeper = made(nursery)
    old = keeper.line()
    old.kill()
    wait(lambda: keeper.restarts == 1)
    keeper.lost(old)
    assert keeper.pid == 1
    assert not nursery.lines[1].dead.is_set()


def test_who_waits_while_it_closes_hears_so(made):
    nursery = FakeNursery()
    keeper = made(nursery)
    nursery.may_fork.clear()
    keeper.lost(keeper.line())
    problems: list[Overloaded] = []

    def ask() -> None:
        with pytest.raises(Overloaded) as caught:
            keeper.line()
        problems.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    closing = threading.Thread(target=keeper.close)
    closing.start()
    thread.join(120)
    nursery.may_fork.set()
    closing.join(120)
    assert len(problems) == 1
    assert all(line.closed or line.dead.is_set() for line in nursery.lines)
