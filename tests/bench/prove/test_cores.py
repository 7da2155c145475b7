"""Threads and processes where they belong, and what they cost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from bertology_serve.bench.prove import cores

SCRIPT = """
import sys, threading
def named():
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
        file.write("executor")
    print("ready", flush=True)
    sys.stdin.read()
threading.Thread(target=named).start()
"""
needs_two = pytest.mark.skipif(cores.pair() is None, reason="one core only")


@pytest.fixture
def other():
    """A process with a thread that is named as an executor."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process.pid
    process.communicate("", timeout=120)


def where(pid: int) -> dict[str, set[int]]:
    return {name: os.sched_getaffinity(task) for task, name, _ in cores._tasks(pid)}


@needs_two
def test_the_executor_is_apart_from_the_rest(other):
    first, second = cores.pair() or (0, 0)
    before = os.sched_getaffinity(0)
    with cores.apart(other) as pinned:
        assert pinned
        assert os.sched_getaffinity(0) == {first}
        found = where(other)
        assert found.pop("executor") == {second}
        assert list(found.values()) == [{first}]
        with cores.alone():
            assert os.sched_getaffinity(0) == {second}
    assert os.sched_getaffinity(0) == before


@needs_two
def test_whole_servers_beside_the_client(other):
    _, second = cores.pair() or (0, 0)
    with cores.across([other]) as pinned:
        assert pinned
        assert set(map(frozenset, where(other).values())) == {frozenset({second})}


def test_one_core_is_told(monkeypatch, other):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(cores, "pair", cores.pair.__wrapped__)
    with cores.apart(other) as one, cores.across([other]) as two, cores.alone() as three:
        assert [one, two, three] == [False] * 3


def test_what_a_process_costs(other):
    assert other in cores.family(os.getpid())
    assert 0 < cores.resident_bytes(other) < cores.resident_bytes(os.getpid())
    before = cores.cpu_seconds(os.getpid())
    thread = threading.Thread(target=lambda: sum(range(10**7)))
    thread.start()
    thread.join()
    assert cores.cpu_seconds(os.getpid()) > before
