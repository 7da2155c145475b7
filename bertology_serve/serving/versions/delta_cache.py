"""The tiers of deltas: disk, host, device. What moves them runs on threads of its own, never on that of the batches.

    DISK --read, check--> HOST --copy rows--> DEVICE --evict--> HOST --evict--> DISK

A delta on its way up is LOADING: one flight a delta, whoever waits for it. Resident deltas never wait for cold ones.

What is on the device is counted by the ``Ledger`` of what runs batches: versions that answer, canaries and shadows
beside them, and those that have left but that calls under way still hold. The version before the one that answers is
on the host like any other, and read again where it had to leave.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from weakref import WeakValueDictionary

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import BASE, DeltaSet
from bertology_serve.errors import BertologyError, LimitError, NotFound, Overloaded
from bertology_serve.serving.versions.cards import ServedDelta
from bertology_serve.serving.versions.gdsf_cache import GdsfCache

log = logging.getLogger(__name__)
REMEMBERED = 5.0  # seconds for which a delta that could not be loaded is not tried again
CHEAPEST = 1e-3  # seconds that any read counts as
ALARM = 8  # returns at which it is told of, and then whenever they have doubled
THRASH = 10.0  # seconds within which nothing that was evicted should be wanted again
Read = Callable[[ServedDelta], Delta]


class Tier(Enum):
    """Where a registered delta is."""

    DISK = "disk"
    LOADING = "loading"
    HOST = "host"
    DEVICE = "device"


class DeltaCache:
    """Registered deltas by name (``cards``), of which as many are on host and device as fit. For any thread.

    ``read`` gives the whole delta of a card. Capacities are bytes of the deltas' tensors; not all of them need fit
    where the device is ``bounded``, an unbounded one has an unbounded host. While one version takes another's place
    both are there.
    """

    def __init__(
        self,
        pipeline: DeltaSet,
        read: Read,
        device_bytes: float = math.inf,
        host_bytes: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipeline, self._read, self._clock = pipeline, read, clock
        self.cards: dict[str, ServedDelta] = {}
        self.pins: set[str] = set()
        self.loads, self.evictions, self.failures, self.thrashed = 0, 0, 0, 0
        self._device, self._host = (
            GdsfCache(device_bytes),
            GdsfCache(host_bytes if device_bytes < math.inf else math.inf),
        )
        self.bounded = device_bytes < math.inf
        self._deltas: dict[str, Delta] = {}  # on the host, by name and version
        self._before: dict[str, ServedDelta] = {}
        self._costs: dict[str, float] = {}
        self._flying: set[str] = set()
        self._leases: Counter[str] = Counter()
        self._failed: dict[str, tuple[float, type[BertologyError], str]] = {}
        self._left: dict[str, float] = {}
        self._room = threading.RLock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # there while somebody holds it

    @property
    def device_bytes(self) -> int:
        return self.pipeline.ledger.total

    @property
    def host_bytes(self) -> int:
        return self._host.used

    def tier(self, name: str) -> Tier:
        """Where a delta is; NotFound for one that is not registered."""
        if name not in self.cards:
            raise NotFound(f"no delta {name[:80]!r} is registered")
        if self.pipeline.resident(name) is not None:
            return Tier.DEVICE
        if name in self._flying:
            return Tier.LOADING
        return Tier.HOST if place_of(self.cards[name]) in self._deltas else Tier.DISK

    def counts(self) -> dict[Tier, int]:
        found = Counter(self.tier(name) for name in list(self.cards))
        return {tier: found[tier] for tier in Tier}

    def is_cold(self, name: str) -> bool:
        """Whether a delta is registered and does not answer at once."""
        return name in self.cards and self.pipeline.resident(name) is None

    def touch(self, names: Iterable[str]) -> None:
        if self.bounded:
            for name in names:
                self._device.touch(name)

    @contextmanager
    def lease(self, names: Iterable[str]) -> Iterator[None]:
        held = list(names)
        with self._room:
            self._leases.update(held)
        try:
            yield
        finally:
            with self._room:
                self._leases.subtract(held)
                for name in held:
                    if not self._leases[name]:
                        del self._leases[name]

    def has_room(self, card: ServedDelta) -> bool:
        return card.size <= self._device.capacity - self.device_bytes

    def register(self, card: ServedDelta) -> None:
        """Makes a delta known; it is read when it is first asked."""
        with self._room:
            self.cards[card.name] = card
            self._failed.pop(card.name, None)

    def raise_up(self, name: str) -> Delta:
        """Brings a registered delta to the device, now, in this thread; the resident one where it is there.

        Raises NotFound, what is wrong with its files, Overloaded where nothing may leave for it.
        """
        with self._lock(name):
            resident = self.pipeline.resident(name)
            card = self.cards.get(name)
            if card is None:
                raise NotFound(f"no delta {name[:80]!r} is registered")
            if resident is not None and resident.version == card.version:
                return resident
            self._check_failed(name)
            with self._flight(name):
                try:
                    delta = self._fetched(card)
                    self._publish(delta)
                except BertologyError as problem:
                    self.failures += 1
                    if not isinstance(problem, Overloaded):  # remembered by its words: its frames hold tensors
                        self._failed[name] = (self._clock() + REMEMBERED, type(problem), str(problem))
                    raise
            return delta

    def put(self, card: ServedDelta, delta: Delta) -> None:
        """Makes a version that was read answer from one moment on; calls under way finish on the one before.

        That one is kept for a ``rollback``. Where this fails, it goes on answering.
        """
        with self._lock(card.name):
            self._swap(card, delta)

    def rollback(self, name: str) -> Delta:
        """Makes the version answer again that answered before, from the host or from disk. NotFound."""
        with self._lock(name):
            card = self._before.get(name)
            if card is None:
                raise NotFound(f"delta {name[:80]!r} had no version before this one; load one by name")
            delta = self._fetched(card)
            self._swap(card, delta)
            return delta

    def stand_by(self, delta: Delta) -> None:
        """Makes a version resident beside the one that answers, for calls that name it, until it is removed."""
        with self._lock(delta.name):
            self._make_resident(delta, beside=True)

    def remove(self, name: str) -> None:
        """Takes a delta out of all tiers. NotFound, Unsupported."""
        with self._lock(name):
            with self._room:
                known, before = self.cards.pop(name, None), self._before.pop(name, None)
                self.pins.discard(name)
                for card in (known, before):
                    if card is not None:
                        self._evict_from_host(card)
                self._device.evict(name)
                for notes in (self._costs, self._failed, self._left):
                    notes.pop(name, None)
            if name == BASE or known is None or self.pipeline.resident(name) is not None:
                self.pipeline.remove(name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keeps a delta on the device whatever else is asked, or no longer."""
        with self._room:
            (self.pins.add if pinned else self.pins.discard)(name)

    def _fetched(self, card: ServedDelta) -> Delta:
        known = self._deltas.get(place_of(card))
        if known is not None:
            return known
        started = self._clock()
        delta = self._read(card)
        self._costs[card.name] = max(self._clock() - started, CHEAPEST)
        self.loads += 1
        return delta

    def _swap(self, card: ServedDelta, delta: Delta) -> None:
        """One version for another; the old one goes to the host, whichever was before it goes altogether."""
        name, old = card.name, self.pipeline.resident(card.name)
        with self._flight(name):
            self._publish(delta)
            with self._room:
                before = self.cards.get(name)
                self.register(card)
                if before is None or before.version == card.version:
                    return
                stale, self._before[name] = self._before.get(name), before
                if stale is not None and stale.version != before.version:
                    self._evict_from_host(stale)
                if old is not None:
                    self._put_on_host(old)

    def _publish(self, delta: Delta) -> None:
        size = self._make_resident(delta)
        with self._room:
            self._device.put(delta.name, size, self._costs.get(delta.name, CHEAPEST))
            self._evict_from_host(delta)
            self._note_return(delta.name)

    def _make_resident(self, delta: Delta, beside: bool = False) -> int:
        """Makes room, then copies rows; the copying is all that batches wait for. The bytes that it takes."""
        size = self.pipeline.resident_bytes(delta)
        if size > self._device.capacity:
            raise LimitError(f"delta {delta.name!r} has {size} bytes; the device takes {self._device.capacity:g}")
        with self._room:
            free = self._device.capacity - self.device_bytes
            if not beside:
                free += self._device.size(delta.name)  # of the version whose place it takes
            while size > free:
                free += self._evict(self._device.victim(self._spared(delta.name)), size)
            key = self.pipeline.reserve(delta)
        self.pipeline.add(delta, beside, key)
        return size

    @contextmanager
    def _flight(self, name: str) -> Iterator[None]:
        """A delta on its way up, which nobody evicts. Its lock is held."""
        self._flying.add(name)
        try:
            yield
        finally:
            self._flying.discard(name)

    def _spared(self, name: str) -> Callable[[str], bool]:
        return lambda other: other == name or other in self.pins or other in self._leases or other in self._flying

    def _evict(self, name: str | None, size: int) -> int:
        """From device to host, and from host to disk what no longer fits there. The bytes that this sets free."""
        if name is None:
            raise Overloaded(f"no room for {size} bytes on the device: all there is pinned or in use; try again", 1.0)
        delta, freed = self.pipeline.resident(name), self._device.evict(name)
        self.evictions += 1
        self._left[name] = self._clock()
        if not self.pipeline.evict(name):
            return 0
        if delta is not None and name in self.cards:
            self._put_on_host(delta)
        return freed  # once no call under way holds it: its rows are freed between two batches, nobody waits for that

    def _put_on_host(self, delta: Delta) -> None:
        if delta.bytes > self._host.capacity:
            return
        self._evict_from_host(delta)
        while self._host.too_much(delta.bytes):
            gone = self._host.victim()
            assert gone is not None
            self._host.evict(gone)
            del self._deltas[gone]
        self._host.put(place_of(delta), delta.bytes, self._costs.get(delta.name, CHEAPEST))
        self._deltas[place_of(delta)] = delta

    def _evict_from_host(self, delta: Delta) -> None:
        self._host.evict(place_of(delta))
        self._deltas.pop(place_of(delta), None)

    def _note_return(self, name: str) -> None:
        """The alarm: what was evicted a moment ago is here again, so the pool is too small for what is asked."""
        left = self._left.pop(name, None)
        if len(self._left) > 2 * len(self._device) + 64:
            self._left.clear()
        if left is not None and self._clock() - left < THRASH:
            self.thrashed += 1
            if self.thrashed >= ALARM and self.thrashed & (self.thrashed - 1) == 0:
                log.warning(
                    "%d deltas came back within %g s of leaving: the device holds too few", self.thrashed, THRASH
                )

    def _check_failed(self, name: str) -> None:
        until, kind, words = self._failed.get(name, (0.0, BertologyError, ""))
        if self._clock() < until:
            raise kind(words)
        self._failed.pop(name, None)

    def _lock(self, name: str) -> threading.Lock:
        with self._room:
            return self._locks.setdefault(name, threading.Lock())


def place_of(delta: Delta) -> str:
    """What a version goes by on the host."""
    return f"{delta.name}/{delta.version}"


class TierGauges(Collector):
    """Counts at the time of the scrape."""

    def __init__(self, tiers: DeltaCache) -> None:
        self._tiers = tiers

    def describe(self) -> Iterator[Metric]:
        """Nothing: asking the tiers before they are filled would say little."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        tiers = self._tiers
        where = GaugeMetricFamily("bertology_tier_deltas", "Registered deltas by tier", labels=("tier",))
        for tier, count in tiers.counts().items():
            where.add_metric((tier.value,), count)
        yield where
        yield GaugeMetricFamily("bertology_device_delta_bytes", "Bytes of resident deltas", value=tiers.device_bytes)
        for name, text, value in (
            ("loads", "Deltas read from disk", tiers.loads),
            ("load_failures", "Deltas that could not be loaded", tiers.failures),
            ("evictions", "Deltas that left the device for others", tiers.evictions),
            ("thrashes", "Deltas that came back soon after they had left", tiers.thrashed),
        ):
            yield CounterMetricFamily(f"bertology_delta_{name}", text, value=value)
