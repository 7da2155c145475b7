"""Several replicas behind the router, as a discrete-event simulation: what calls of given lengths at given rates meet.

Router, queue, sizes and times of batches, and what leaves memory first are the objects that serve: ``Placement``,
``WorkQueue``, ``BatchTimes``, ``GdsfCache``. Simulated are the clock, the work and the way to it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from bertology_serve.encoder.bank import BARE
from bertology_serve.errors import FormatError, Overloaded, RateLimited
from bertology_serve.files import JsonObject
from bertology_serve.scale.placement import HOT, WINDOW, Placement, ReplicaState
from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import DEFAULT_PRIORITY, CallItem, FairScheduler, ItemState
from bertology_serve.serving.config import BatchingConfig
from bertology_serve.serving.versions.gdsf_cache import GdsfCache
from bertology_serve.serving.versions.lifecycle import LOADERS

Floats = NDArray[np.float64]
BATCHING = BatchingConfig()
COST = 1.0  # to fetch any delta: they are alike


@dataclass(frozen=True)
class ReplicaCosts:
    """What one replica takes, in seconds and bytes; ``bench serving --calibration`` measures it and writes it as JSON.

    ``ladder`` are (tokens, Σlen², seconds) of batches. ``call_seconds`` is a call's time outside its batch, which the
    event loop spends on one call after the other, ``route_seconds`` what a router adds. ``load_seconds`` is a delta
    from disk, ``lift_seconds`` one from the host's memory. A delta of rank r has ``delta_bytes + r * rank_bytes``.
    ``backbone`` and ``environment`` say what was measured.
    """

    ladder: tuple[tuple[float, float, float], ...]
    call_seconds: float = 0.0
    route_seconds: float = 0.0005
    load_seconds: float = 0.0
    lift_seconds: float = 0.0
    delta_bytes: int = 0
    rank_bytes: int = 1
    backbone: str = ""
    environment: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.call_seconds, self.route_seconds, self.load_seconds, self.lift_seconds, self.delta_bytes)
        wrong = [number for number in (*numbers, *sum(self.ladder, ())) if not number >= 0]
        if wrong or len(self.ladder) < 2 or self.rank_bytes < 1:
            raise FormatError("a calibration's times and sizes are numbers from 0, its ladder two batches or more")

    def times(self) -> BatchTimes:
        """How long batches take, and how large they may be."""
        ladder = [(round(tokens), round(squares), seconds) for tokens, squares, seconds in self.ladder]
        return BatchTimes(BATCHING.max_batch_ms / 1e3, BATCHING.max_batch_tokens, ladder)


@dataclass(frozen=True)
class Memory:
    """Bytes for the deltas of one replica, on the device and on the host; those of the deltas, in turn by rank."""

    device: float = math.inf
    host: float = 0.0
    sizes: tuple[int, ...] = (1,)

    def size(self, delta: str) -> int:
        """Bytes of a delta."""
        return self.sizes[rank_of(delta) % len(self.sizes)]


@dataclass(frozen=True)
class Calls:
    """Calls as they come: seconds since the start [N], the rank of each one's delta [N] (0: asked most), tokens [N].

    With ``clients``, the n-th comes as soon as one of those before is answered, so many at a time.
    """

    due: Floats
    ranks: NDArray[np.int64]
    tokens: NDArray[np.int64]
    clients: int = 0

    @classmethod
    def drawn(
        cls,
        rate: float,
        count: int,
        shares: Floats,
        mean: float,
        spread: float = 0.6,
        longest: int = 512,
        seed: int = 0,
        clients: int = 0,
    ) -> Calls:
        """Poisson arrivals, ``rate`` a second; deltas by their ``shares`` [D]; lengths lognormal."""
        draw = np.random.default_rng(seed)
        due = draw.exponential(1 / rate, count).cumsum()
        ranks = np.searchsorted(shares.cumsum(), draw.random(count)).clip(max=len(shares) - 1)
        lengths = draw.lognormal(math.log(mean) - spread**2 / 2, spread, count)
        return cls(due, ranks, lengths.round().clip(1, longest).astype(np.int64), clients)


def zipf_shares(deltas: int, exponent: float) -> Floats:
    """The share of calls of each delta [D]: the k-th is asked as often as ``k ** -exponent``."""
    weights: Floats = np.arange(1, deltas + 1, dtype=np.float64) ** -exponent
    return weights / float(weights.sum())


def delta_name(rank: int) -> str:
    """What the delta is called that so many others are asked more than."""
    return f"d{rank}"


def rank_of(delta: str) -> int:
    """The inverse of ``delta_name``."""
    return int(delta[1:])


class SimulatedCall(CallItem):
    """A call of one text that shares nothing with others, as the queue sees it."""

    encodings = ()
    ready = SimpleNamespace(entry=BARE)  # type: ignore[assignment]

    def __init__(self, number: int, delta: str, tokens: int, due: float, replica: SimulatedReplica) -> None:
        self.number, self.delta, self.due, self.replica = number, delta, due, replica
        self.cost = self.charged = tokens
        self.squares = tokens * tokens
        self.deadline, self.priority, self.state = math.inf, DEFAULT_PRIORITY, ItemState.WAITING


@dataclass
class SimulatedOutcome:
    """What became of the calls: seconds of each [N] and when it ended [N], NaN where it was refused; whether its delta
    was resident [N]. ``busy`` are the seconds of batches on all replicas, ``seconds`` is when the last call ended.
    """

    latency: Floats
    ended: Floats
    hit: NDArray[np.bool_]
    busy: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(cls, count: int) -> SimulatedOutcome:
        """That of so many calls of which none has ended."""
        return cls(np.full(count, np.nan), np.full(count, np.nan), np.zeros(count, dtype=np.bool_))

    def after(self, skipped: float) -> SimulatedOutcome:
        """Without the first calls, a share of all: what a start has of its own."""
        first = int(skipped * len(self.latency))
        return replace(self, latency=self.latency[first:], ended=self.ended[first:], hit=self.hit[first:])

    @property
    def refused(self) -> float:
        """The share of calls that were."""
        return float(np.isnan(self.latency).mean())

    @property
    def throughput(self) -> float:
        """Answers a second, from the first to the last."""
        ended = self.ended[~np.isnan(self.ended)]
        return (len(ended) - 1) / float(np.ptp(ended)) if len(ended) > 1 else 0.0

    @property
    def milliseconds(self) -> tuple[float, float]:
        """The 50th and the 99th percentile of the answers' time; endless without answers."""
        answered = self.latency[~np.isnan(self.latency)]
        p50, p99 = np.quantile(1e3 * answered, (0.5, 0.99)) if len(answered) else (math.inf, math.inf)
        return float(p50), float(p99)


class SimulatedReplica:
    """One server: an event loop, deltas on device and host, threads that load them, a queue, one batch at a time."""

    def __init__(self, fleet: SimulatedFleet, state: ReplicaState) -> None:
        self.fleet, self.state = fleet, state
        times = fleet.times
        scheduler = FairScheduler(times.budget)
        scheduler.hurried, scheduler.seconds, scheduler.bend = times.hurried, times.seconds, times.bend
        self.queue = WorkQueue(
            scheduler, times, BATCHING.max_queue_tokens, BATCHING.max_delta_tokens, lambda: fleet.now
        )
        self.device, self.host = GdsfCache(fleet.memory.device), GdsfCache(fleet.memory.host)
        self.held, self.flights = Counter[str](), dict[str, list[SimulatedCall]]()
        self._line, self._loading, self._landing = deque[str](), 0, list[str]()
        self._loop_free, self._running = 0.0, False
        self._counted = (0.0, 0.0)

    def holds(self, delta: str) -> bool:
        """Whether it answers for that delta without loading it."""
        return self.fleet.memory.device == math.inf or delta in self.device

    def receive(self, call: SimulatedCall) -> None:
        """A call has come: the event loop reads it."""
        self._loop_free = max(self._loop_free, self.fleet.now) + self.fleet.calibration.call_seconds
        self.fleet.at(self._loop_free, self._admit, call)

    def make_resident(self, delta: str) -> bool:
        """Takes a delta onto the device and what is worth least off it, as ``DeltaCache`` does. False: all are held."""
        size = self.fleet.memory.size(delta)
        while self.device.too_much(size):
            victim = self.device.victim(self.held.__contains__)
            if victim is None:
                return False
            self.device.evict(victim)
            self.state.resident.discard(victim)
            self._put_on_host(victim)
        self.host.evict(delta)
        self.device.put(delta, size, COST)
        self.state.resident.add(delta)
        return True

    def _put_on_host(self, delta: str) -> None:
        size = self.fleet.memory.size(delta)
        if size <= self.host.capacity:
            while self.host.too_much(size):
                self.host.evict(self.host.victim() or "")
            self.host.put(delta, size, COST)

    def _admit(self, call: SimulatedCall) -> None:
        """To the queue, or to those that wait for the delta to be loaded: one flight a delta."""
        delta = call.delta
        self.held[delta] += 1
        if self.holds(delta):
            self.device.touch(delta)
            self._enqueue(call)
        elif delta in self.flights:
            self.flights[delta].append(call)
        else:
            self.flights[delta] = [call]
            self._line.append(delta)
            self._load_next()

    def _load_next(self) -> None:
        while self._line and self._loading < LOADERS:
            delta, known = self._line.popleft(), self.fleet.calibration
            seconds = known.lift_seconds if delta in self.host else known.load_seconds
            self._loading += 1
            self.fleet.at(self.fleet.now + seconds, self._loaded, delta)

    def _loaded(self, delta: str) -> None:
        """A delta has been read. Its rows are copied where no batch runs."""
        if self._running:
            self._landing.append(delta)
        else:
            self._land(delta)

    def _land(self, delta: str) -> None:
        self._loading -= 1
        fits = self.make_resident(delta)
        for call in self.flights.pop(delta):
            if fits:
                self.device.touch(delta)
                self._enqueue(call)
            else:
                self._end(call, math.nan)
        self._load_next()

    def _enqueue(self, call: SimulatedCall) -> None:
        try:
            self.queue.put([call])
        except (Overloaded, RateLimited):
            self._end(call, math.nan)
            return
        if not self._running:
            self._run()

    def _run(self) -> None:
        """The next batch."""
        batch, times = self.queue.take(), self.fleet.times
        seconds = times.seconds(sum([item.size(times.bend, item.spared) for item in batch]))
        self._running = True
        self.fleet.at(self.fleet.now + seconds, self._finish, batch, seconds)

    def _finish(self, batch: Sequence[CallItem], seconds: float) -> None:
        tokens, before = self._counted
        self._counted = tokens + sum([item.cost for item in batch]), before + seconds
        self.state.capacity = self._counted[0] / self._counted[1]
        self.fleet.outcome.busy += seconds
        for call in batch:
            assert isinstance(call, SimulatedCall)
            self._end(call, self.fleet.now - call.due)
        self._running, landing, self._landing = False, self._landing, []
        if self.queue.items:
            self._run()
        for delta in landing:  # as the next batch has been taken
            self._land(delta)

    def _end(self, call: SimulatedCall, seconds: float) -> None:
        self.held[call.delta] -= 1
        if not self.held[call.delta]:
            del self.held[call.delta]
        self.fleet.end(call, seconds)


class SimulatedFleet:
    """So many replicas, and a router where there are several. ``run`` answers calls."""

    def __init__(self, replicas: int, calibration: ReplicaCosts, memory: Memory | None = None) -> None:
        self.calibration, self.memory, self.times = calibration, memory or Memory(), calibration.times()
        self.placement = Placement(f"replica-{number}" for number in range(replicas))
        self.replicas = {name: SimulatedReplica(self, state) for name, state in self.placement.replicas.items()}
        self.now = 0.0
        self.outcome = SimulatedOutcome.of(0)
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()

    def at(self, when: float, do: Callable[..., None], *what: object) -> None:
        """Has something done at that time."""
        heapq.heappush(self._events, (when, next(self._order), do, what))

    def settle(self, shares: Floats, tokens: float) -> None:
        """What has been so for long at the start: hot deltas have their replicas, and memory holds what is asked most.

        ``shares`` [D] are those of the calls, ``tokens`` what comes a second.
        """
        capacity = self.times.rate
        for one in self.placement.replicas.values():
            one.capacity = capacity
        for rank in range(int((shares * tokens > HOT * capacity).sum())):
            self.placement.count(delta_name(rank), float(shares[rank]) * tokens * WINDOW, 0.0)
        left = len(self.replicas) * self.memory.device
        for rank in range(len(shares) if self.memory.device < math.inf else 0):
            delta = delta_name(rank)
            for home in (self.replicas[name] for name in self.placement.homes(delta)):
                if not home.device.too_much(self.memory.size(delta)):
                    home.make_resident(delta)
            left -= self.memory.size(delta)
            if left < 0:
                break

    def run(self, calls: Calls) -> SimulatedOutcome:
        """Answers all calls."""
        count = len(calls.due)
        self._calls, self._next = calls, 0
        self.outcome = SimulatedOutcome.of(count)
        for _ in range(min(calls.clients or 1, count)):
            self._come()
        while self._events:
            self.now, _, do, what = heapq.heappop(self._events)
            do(*what)
        self.outcome.seconds = self.now
        return self.outcome

    def _come(self) -> None:
        """The next call is due; with clients, now."""
        number = self._next
        if number >= len(self._calls.due):
            return
        self._next += 1
        due = self.now if self._calls.clients else float(self._calls.due[number])
        self.at(due, self._arrive, number, due)

    def _arrive(self, number: int, due: float) -> None:
        delta, tokens = delta_name(int(self._calls.ranks[number])), int(self._calls.tokens[number])
        self.placement.count(delta, tokens, self.now)
        state = self.placement.begin(delta, tokens)
        assert state is not None
        replica = self.replicas[state.name]
        self.outcome.hit[number] = replica.holds(delta)
        call = SimulatedCall(number, delta, tokens, due, replica)
        route = self.calibration.route_seconds if len(self.replicas) > 1 else 0.0
        self.at(self.now + route, replica.receive, call)
        if not self._calls.clients:
            self._come()

    def end(self, call: SimulatedCall, seconds: float) -> None:
        """A call was answered after so many seconds, or refused: NaN."""
        self.placement.end(call.replica.state, call.cost)
        self.outcome.latency[call.number] = seconds
        self.outcome.ended[call.number] = self.now if seconds == seconds else math.nan
        if self._calls.clients:
            self._come()
