"""What to throw out first: GreedyDual-Size-Frequency (Cherkasova, Improving WWW Proxies Performance, 1998).

An entry's worth is ``clock + uses · cost / size``; the least worthy goes, and the clock is set to its worth. Of equal
cost, size and use this is least recently used; what is dear to fetch for its size, or often used, stays longer, and
yet everything leaves that is not used for long enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Kept:
    """One entry: bytes, seconds to fetch, and what follows from its uses."""

    size: int
    cost: float
    uses: int = 0
    worth: float = 0.0


class GdsfCache:
    """Entries of known size (bytes) and cost (seconds to fetch), up to ``capacity`` bytes altogether.

    One thread at a time changes it; ``touch`` is for any thread.
    """

    def __init__(self, capacity: float) -> None:
        self.capacity, self.used = capacity, 0
        self._clock = 0.0
        self._entries: dict[str, Kept] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def size(self, name: str) -> int:
        """Bytes of an entry; 0 for one that is not there."""
        return self._entries[name].size if name in self._entries else 0

    def put(self, name: str, size: int, cost: float) -> None:
        """Takes in an entry, or one of that name anew; the caller has made room."""
        self.evict(name)
        self._entries[name] = Kept(size, cost)
        self.used += size
        self.touch(name)

    def touch(self, name: str) -> None:
        """Notes a use; of what was evicted meanwhile it is lost."""
        entry = self._entries.get(name)
        if entry is not None:
            entry.uses += 1
            entry.worth = self._clock + entry.uses * entry.cost / max(entry.size, 1)

    def evict(self, name: str) -> int:
        """Takes an entry out; its bytes, 0 for an unknown name."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return 0
        self.used -= entry.size
        return entry.size

    def victim(self, spared: Callable[[str], bool] = lambda name: False) -> str | None:
        """The name that goes next; ``None`` where all are spared. It is still there."""
        free = [(entry.worth, name) for name, entry in self._entries.items() if not spared(name)]
        if not free:
            return None
        worth, name = min(free)
        self._clock = max(self._clock, worth)
        return name

    def too_much(self, size: int) -> bool:
        return self.used + size > self.capacity
