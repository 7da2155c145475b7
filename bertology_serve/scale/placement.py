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
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from statistics import median

BOUND = 1.25  # times the mean: the work that one replica may have under way
SLACK = 1024.0  # tokens that any replica may have under way, however little the others have: about one batch
HOT, COOL = 0.5, 0.35  # shares of a replica's tokens a second: a delta above HOT gets another one, below COOL one less
HOLD = 30.0  # seconds that a delta must be below COOL for that
WINDOW = 2.0  # seconds: what came so long ago counts 1/e in a rate
MOST = 10_000  # deltas whose rate is kept


@dataclass
class ReplicaState:
    """What is known of one replica. It takes calls while it is ``ready``, but for deltas that are ``stale`` there.

    ``load`` are tokens of calls under way, ``capacity`` its tokens a second (0: not known), ``resident`` the deltas
    that it answers without loading them first.
    """

    name: str
    ready: bool = True
    load: float = 0.0
    capacity: float = 0.0
    resident: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)


@lru_cache(maxsize=65_536)
def ordered(delta: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The replicas in the order of that delta: the same for whoever asks, whatever the order of ``names``."""
    return tuple(sorted(names, key=lambda name: blake2b(f"{delta}\0{name}".encode(), digest_size=8).digest()))


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
        self.keep(names)

    def keep(self, names: Iterable[str]) -> None:
        """From now on there are these replicas. Those that were there before stay as they are."""
        self.replicas = {name: self.replicas.get(name) or ReplicaState(name) for name in names}
        self._names = tuple(sorted(self.replicas))

    def spread(self) -> dict[str, int]:
        """The deltas that have more than one replica, and how many."""
        return {delta: rate.replicas for delta, rate in self._rates.items() if rate.replicas > 1}

    def homes(self, delta: str) -> list[str]:
        """The replicas that a delta lives on now, the first first; those that are not ready are passed over."""
        rate = self._rates.get(delta)
        able = [name for name in ordered(delta, self._names) if self._takes(name, delta)]
        return able[: rate.replicas if rate else 1]

    def in_order(self, delta: str) -> list[ReplicaState]:
        """The replicas that take calls, in the order of that delta."""
        return [self.replicas[name] for name in ordered(delta, self._names) if self.replicas[name].ready]

    def count(self, delta: str, tokens: float, now: float) -> None:
        """Notes a call for a delta that has come; once for each, however often it is tried."""
        rate = self._rates.get(delta)
        if rate is None:
            if len(self._rates) >= MOST:
                self._forget(now)
            rate = self._rates[delta] = TokenRate()
        rate.add(tokens, now)
        rate.settle(self._capacity(), len(self._names), now)

    def cool(self, now: float) -> None:
        """Lets deltas that were asked more before live on fewer replicas; for once in a while."""
        capacity = self._capacity()
        for rate in self._rates.values():
            rate.settle(capacity, len(self._names), now)

    def begin(self, delta: str | None, tokens: float, tried: Collection[str] = ()) -> ReplicaState | None:
        """The replica for a call, whose tokens count as its load until ``end``; ``None`` where there is none.

        Without a delta any of them does. ``tried`` are those that were asked in vain.
        """
        order = self._names if delta is None else ordered(delta, self._names)
        able = [self.replicas[name] for name in order if name not in tried and self._takes(name, delta)]
        if not able:
            return None
        chosen = self._chosen(able, delta, tokens)
        chosen.load += tokens
        return chosen

    def end(self, replica: ReplicaState, tokens: float) -> None:
        """The call that ``begin`` counted there is over."""
        replica.load = max(0.0, replica.load - tokens)

    def _chosen(self, able: list[ReplicaState], delta: str | None, tokens: float) -> ReplicaState:
        """The least busy one of the delta's own; beyond the bound one that has it already, or the next in its order."""
        rate = self._rates.get(delta) if delta is not None else None
        homes = len(able) if delta is None else rate.replicas if rate else 1
        own = min(able[:homes], key=lambda one: one.load)
        bound = max(SLACK, BOUND * (sum(one.load for one in able) + tokens) / len(able))
        if own.load + tokens <= bound or homes >= len(able):
            return own
        others = [one for one in able[homes:] if one.load + tokens <= bound]
        return next(
            (one for one in others if delta in one.resident),
            others[0] if others else min(able, key=lambda one: one.load),
        )

    def _takes(self, name: str, delta: str | None) -> bool:
        state = self.replicas[name]
        return state.ready and delta not in state.stale

    def _capacity(self) -> float:
        known = [one.capacity for one in self.replicas.values() if one.capacity]
        return median(known) if known else 0.0

    def _forget(self, now: float) -> None:
        """The half of the deltas that are asked least."""
        asked = sorted(self._rates, key=lambda delta: self._rates[delta].at(now))
        for delta in asked[: MOST // 2]:
            del self._rates[delta]
