"""Which processes come from which, by Linux's /proc."""

from __future__ import annotations

from pathlib import Path


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
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found
