"""Which replica answers for which delta. Decides and does nothing else: no clock, no network, no randomness.

Rendezvous hashing (Thaler & Ravishankar, Using name-based mappings to increase hit rates, 1998) orders the replicas for
each delta, so that all who decide agree without a word, and a replica that comes or goes moves its own deltas only. A
delta lives on the first replica of its order; one whose calls are too many for it, on the first two, three and so on.
Loads are bounded (Mirrokni, Thorup & Zadimoghaddam, Consistent Hashing with Bounded Loads, 2018): a call whose replica
has more than 1.25 times the mean of work under way goes to another one, which has the delta already where there is one.

Work is counted in tokens, times in seconds, both by whoever asks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from statistics import median

import numpy as np
from numpy.typing import NDArray

BOUND = 1.25  # times the mean: the work that one replica may have under way
SLACK = 1024.0  # tokens that any replica may have under way, however little the others have: about one batch
HOT, COOL = 0.5, 0.35  # shares of a replica's tokens a second: a delta above HOT gets another one, below COOL one less
HOLD = 30.0  # seconds that a delta must be below COOL for that
WINDOW = 2.0  # seconds: what came so long ago counts 1/e in a rate
MOST = 10_000  # deltas whose rate is kept
FIRST = 16  # replicas of a delta's order that are kept: further ones are asked where these are full or gone
STALE = 1.0  # seconds for which the replicas' middle capacity is kept


@dataclass
class ReplicaState:
    """What is known of one replica. It takes calls while it is ``ready``, but for deltas that are ``stale`` there.

    ``load`` are tokens of calls under way, ``capacity`` its tokens a second (0: not known), ``resident`` the deltas
    that it answers without loading them first. ``endpoint`` is its IP:PORT, for those who do not ask by name.
    """

    name: str
    ready: bool = True
    load: float = 0.0
    capacity: float = 0.0
    resident: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)
    endpoint: str = ""


def ordered(delta: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The replicas in the order of that delta: the same for whoever asks, whatever the order of ``names``.

    A replica's place follows from its own hash and the delta's, mixed as SplitMix64 does (Steele, Lea & Flood, Fast
    splittable pseudorandom number generators, 2014).
    """
    return tuple([names[place] for place in _scores(delta, names).argsort()])


@lru_cache(maxsize=65_536)
def _first(delta: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The beginning of that order, which is what most calls need."""
    scores, count = _scores(delta, names), min(FIRST, len(names))
    places = scores.argpartition(count - 1)[:count] if count else scores.argsort()
    return tuple([names[place] for place in places[scores[places].argsort()]])


def _scores(delta: str, names: tuple[str, ...]) -> NDArray[np.uint64]:
    mixed = _hashes(names) ^ _hash(delta)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@lru_cache(maxsize=8)
def _hashes(names: tuple[str, ...]) -> NDArray[np.uint64]:
    return np.array([_hash(name) for name in names], dtype=np.uint64)


def _hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little"))


class TokenRate:
    """The tokens a second of one delta, as they came lately, and how many replicas it has for them."""

    __slots__ = ("_cool_since", "_rate", "_seen", "replicas")

    def __init__(self) -> None:
        self._rate, self._seen, self._cool_since, self.replicas = 0.0, -math.inf, math.inf, 1

    def at(self, now: float) -> float:
        """Tokens a second."""
        return self._rate * math.exp((self._seen - now) / WINDOW) if self._rate else 0.0

    def add(self, tokens: float, now: float) -> None:
        """Counts what has come."""
        self._rate, self._seen = self.at(now) + tokens / WINDOW, now

    def settle(self, capacity: float, most: int, now: float) -> int:
        """How many replicas of that capacity it has from now on: more at once, fewer one after the other."""
        if not capacity:
            return self.replicas
        rate = self.at(now)
        self.replicas = min(max(self.replicas, math.ceil(rate / (HOT * capacity))), most)
        if self.replicas > 1 and rate < COOL * capacity * (self.replicas - 1):
            self._cool_since = min(self._cool_since, now)
            if now - self._cool_since >= HOLD:
                self.replicas, self._cool_since = self.replicas - 1, now
        else:
            self._cool_since = math.inf
        return self.replicas


class Placement:
    """Sends calls to replicas. ``begin`` chooses one and counts the call there until ``end``."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.replicas: dict[str, ReplicaState] = {}
        self._names: tuple[str, ...] = ()
        self._rates: dict[str, TokenRate] = {}
        self._middle, self._looked = 0.0, -math.inf
        self.keep(names)

    def keep(self, names: Iterable[str]) -> None:
        """From now on there are these replicas. Those that were there before stay as they are."""
        self.replicas = {name: self.replicas.get(name) or ReplicaState(name) for name in names}
        self._names, self._looked = tuple(sorted(self.replicas)), -math.inf

    def spread(self) -> dict[str, int]:
        """The deltas that have more than one replica, and how many."""
        return {delta: rate.replicas for delta, rate in self._rates.items() if rate.replicas > 1}

    def homes(self, delta: str) -> list[str]:
        """The replicas that a delta lives on now, the first first; those that are not ready are passed over."""
        return [one.name for one in islice(self._able(delta), self._count(delta))]

    def in_order(self, delta: str) -> list[ReplicaState]:
        """The replicas that take calls, in the order of that delta."""
        return [self.replicas[name] for name in ordered(delta, self._names) if self.replicas[name].ready]

    def count(self, delta: str | None, tokens: float, now: float) -> None:
        """Notes a call for a delta that has come; once for each, however often it is tried."""
        if delta is None:
            return
        rate = self._rates.get(delta)
        if rate is None:
            if len(self._rates) >= MOST:
                self._forget(now)
            rate = self._rates[delta] = TokenRate()
        rate.add(tokens, now)
        rate.settle(self._capacity(now), len(self._names), now)

    def cool(self, now: float) -> None:
        """Lets deltas that were asked more before live on fewer replicas; for once in a while."""
        capacity = self._capacity(now)
        for rate in self._rates.values():
            rate.settle(capacity, len(self._names), now)

    def begin(self, delta: str | None, tokens: float, tried: Collection[str] = ()) -> ReplicaState | None:
        """The replica for a call, whose tokens count as its load until ``end``; ``None`` where there is none.

        Without a delta any of them does. ``tried`` are those that were asked in vain.
        """
        chosen = self._chosen(delta, tokens, tried)
        if chosen is not None:
            chosen.load += tokens
        return chosen

    def end(self, replica: ReplicaState, tokens: float) -> None:
        """The call that ``begin`` counted there is over."""
        replica.load = max(0.0, replica.load - tokens)

    def _chosen(self, delta: str | None, tokens: float, tried: Collection[str]) -> ReplicaState | None:
        """The least busy one of the delta's own; beyond the bound one that has it already, or the next in its order."""
        homes = len(self._names) if delta is None else self._count(delta)
        able = self._able(delta, tried)
        own = min(islice(able, homes), key=lambda one: one.load, default=None)
        if own is None or own.load + tokens <= SLACK:  # no bound is below that
            return own
        others = list(able)
        if not others:
            return own
        everybody = list(self._able(delta, tried))
        bound = max(SLACK, BOUND * (sum(one.load for one in everybody) + tokens) / len(everybody))
        if own.load + tokens <= bound:
            return own
        free = [one for one in others if one.load + tokens <= bound]
        return next(
            (one for one in free if delta in one.resident),
            free[0] if free else min(everybody, key=lambda one: one.load),
        )

    def _able(self, delta: str | None, tried: Collection[str] = ()) -> Iterator[ReplicaState]:
        """The replicas that take a call, in the order of its delta."""
        for name in self._names if delta is None else self._in_order(delta):
            state = self.replicas[name]
            if state.ready and delta not in state.stale and name not in tried:
                yield state

    def _in_order(self, delta: str) -> Iterator[str]:
        yield from _first(delta, self._names)
        if len(self._names) > FIRST:
            yield from ordered(delta, self._names)[FIRST:]

    def _count(self, delta: str) -> int:
        """How many replicas a delta has."""
        rate = self._rates.get(delta)
        return rate.replicas if rate else 1

    def _capacity(self, now: float) -> float:
        """That of the replica in the middle."""
        if not 0 <= now - self._looked < STALE:
            known = [one.capacity for one in self.replicas.values() if one.capacity]
            self._middle, self._looked = (median(known) if known else 0.0), now
        return self._middle

    def _forget(self, now: float) -> None:
        """The half of the deltas that are asked least."""
        asked = sorted(self._rates, key=lambda delta: self._rates[delta].at(now))
        for delta in asked[: MOST // 2]:
            del self._rates[delta]
