"""What to throw out first: GreedyDual-Size-Frequency (Cherkasova, Improving WWW Proxies Performance, 1998).

An entry's worth is ``clock + uses · cost / size``; the least worthy goes, and the clock is set to its worth. Of equal
cost, size and use this is least recently used; what is dear to fetch for its size, or often used, stays longer, and
yet everything leaves that is not used for long enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator


class Greedy:
    """Entries of known size (bytes) and cost (seconds to fetch), up to ``capacity`` bytes altogether. No thread."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.used = capacity, 0
        self._clock = 0.0
        self._entries: dict[str, tuple[int, float]] = {}
        self._uses: dict[str, int] = {}
        self._worth: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, size: int, cost: float) -> None:
        """Takes in an entry, or one of that name anew; the caller has made room."""
        self.drop(name)
        self._entries[name] = (max(size, 1), cost)
        self.used += max(size, 1)
        self._uses[name] = 0
        self.touch(name)

    def touch(self, name: str) -> None:
        """Notes a use."""
        entry = self._entries.get(name)
        if entry is not None:
            self._uses[name] += 1
            self._worth[name] = self._clock + self._uses[name] * entry[1] / entry[0]

    def drop(self, name: str) -> None:
        """Takes an entry out; unknown names are fine."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.used -= entry[0]
            del self._worth[name], self._uses[name]

    def victim(self, spared: Callable[[str], bool] = lambda name: False) -> str | None:
        """The name that goes next; ``None`` where all are spared. It is still there."""
        free = [(worth, name) for name, worth in self._worth.items() if not spared(name)]
        if not free:
            return None
        worth, name = min(free)
        self._clock = max(self._clock, worth)
        return name

    def too_much(self, size: int) -> bool:
        """Whether one more of that size does not fit."""
        return self.used + max(size, 1) > self.capacity
