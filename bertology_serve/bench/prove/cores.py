"""Who runs on which core while something is timed, and what it costs them. Linux."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from bertology_serve.serving.execution.executor import THREAD

ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_PROC = Path("/proc")


@cache
def pair() -> tuple[int, int] | None:
    """Two cores of those that this process may use, before it was pinned; ``None`` where there is one only."""
    found = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (found[0], found[1]) if len(found) > 1 else None


def family(pid: int) -> list[int]:
    """A process and those that it has started, and theirs."""
    return [pid, *descendants(pid)]


def descendants(pid: int) -> list[int]:
    """The children of a process, then theirs, and so on."""
    found, parents = list[int](), _parents()
    known = {pid}
    while new := sorted(child for child, parent in parents.items() if parent in known and child not in known):
        known.update(new)
        found += new
    return found


def _parents() -> dict[int, int]:
    """The parent of every process that there is; those that have ended and wait to be buried are none."""
    found: dict[int, int] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            state, parent = _fields(path)[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process and those below it have used so far; of those that have ended too."""
    ticks = 0
    for one in family(pid):
        with suppress(OSError):
            ticks += sum(map(int, _fields(_PROC / str(one) / "stat")[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process and those below it, as if no other process shared any of it: all that the largest has
    resident, and what the others have of their own.
    """
    found = [_memory(one) for one in family(pid)]
    whole, own = max(found)
    return whole - own + sum(private for _, private in found)


def _memory(pid: int) -> tuple[int, int]:
    """Bytes that a process has resident, and those of them that are its own."""
    sizes = dict[str, int]()
    for line in (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, size, *_ = line.split()
        sizes[name] = 1024 * int(size)
    return sizes["Rss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"]


def _fields(path: Path) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third on: the second may hold spaces."""
    return path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


@contextmanager
def apart(pid: int) -> Iterator[bool]:
    """The executor of a server on one core; what else it runs, and this thread, on another. Whether that can be.

    An executor is a thread of that name, or a process below the server's.
    """
    with _here() as cores:
        if cores:
            for task, name, owner in _tasks(pid):
                _place(task, cores[1] if owner != pid or name == THREAD else cores[0])
        yield cores is not None


@contextmanager
def across(pids: Sequence[int]) -> Iterator[bool]:
    """Whole servers on one core, and this thread on another. Whether that can be."""
    with _here() as cores:
        if cores:
            for task, _, _ in (one for pid in pids for one in _tasks(pid)):
                _place(task, cores[1])
        yield cores is not None


@contextmanager
def alone() -> Iterator[bool]:
    """This thread on the core that servers have their executors on. Whether that can be."""
    with _here(1) as cores:
        yield cores is not None


@contextmanager
def _here(which: int = 0) -> Iterator[tuple[int, int] | None]:
    """This thread on one of two cores meanwhile."""
    cores = pair()
    if cores is None:
        yield None
        return
    before = os.sched_getaffinity(0)
    _place(0, cores[which])
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, before)


def _tasks(pid: int) -> Iterator[tuple[int, str, int]]:
    """Every thread of a process and of those below it, its name, and its process."""
    for owner in family(pid):
        for path in (_PROC / str(owner) / "task").iterdir():
            with suppress(OSError):
                yield int(path.name), (path / "comm").read_text(encoding="ascii", errors="replace").strip(), owner


def _place(task: int, core: int) -> None:
    with suppress(OSError):  # it has just ended
        os.sched_setaffinity(task, {core})
