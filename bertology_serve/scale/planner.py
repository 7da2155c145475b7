"""How many replicas, and how much memory for deltas on each, answer given calls as fast as they should.

Tries numbers of replicas in a simulation (``simulation``) of the server that a calibration was made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np

from bertology_serve.errors import FormatError, NotFound, SpecError
from bertology_serve.files import JsonObject
from bertology_serve.scale.config import PlanConfig, TargetConfig
from bertology_serve.scale.simulation import Calls, Floats, Memory, ReplicaCosts, SimulatedFleet, zipf_shares

MB = 2**20
WARM = 0.3  # of the simulated calls, which are not counted: queues and memory find their level
LEAST, EACH, MOST = 20_000, 200, 400_000  # simulated calls: at least, for each replica, at most
MEMORY, REPLICAS = 1.15, 1.3  # times as much, or as many, where a target was missed
BUSY, IDLE = 0.9, 0.02  # shares of the time in batches: above it takes more replicas, below they change nothing


@dataclass(frozen=True)
class Trial:
    """One number of replicas, each with so much memory for deltas, and what calls met there. Costs are an hour's, and
    those of a million calls. ``busy`` is the share of time that replicas run batches, ``missed`` the targets not met,
    ``lacks`` what is too little for them.
    """

    replicas: int
    device_mb: float
    resident_deltas: int
    hit_rate: float
    p50_ms: float
    p99_ms: float
    calls_per_second: float
    refused: float
    busy: float
    cost_per_hour: float
    cost_per_million: float
    missed: tuple[str, ...]
    lacks: Literal["", "memory", "replicas"]

    @property
    def fleet(self) -> str:
        """So many replicas."""
        return f"{self.replicas:,} replica{'s' * (self.replicas != 1)}"

    @property
    def says(self) -> str:
        """What calls meet, in one line."""
        misses = f"; misses {', '.join(self.missed)}" if self.missed else ""
        return f"p50 {self.p50_ms:.3g} ms, p99 {self.p99_ms:.3g} ms, {self.hit_rate:.1%} resident{misses}"


def read_calibration(path: Path) -> ReplicaCosts:
    """What ``bench serving --calibration`` wrote. NotFound, FormatError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReplicaCosts)
    except OSError as problem:
        raise NotFound(
            f"cannot read {path}: {problem.strerror}; bench serving --calibration {path} makes one"
        ) from None
    except (msgspec.DecodeError, FormatError, RecursionError) as problem:
        raise FormatError(f"{path} is no calibration: {problem}; bench serving --calibration makes one") from None


class Planner:
    """Tries one fleet after the other; ``trials`` are those tried. ``advance`` hears of each."""

    def __init__(
        self,
        config: PlanConfig,
        known: ReplicaCosts,
        advance: Callable[[Trial], None] = lambda trial: None,
        seed: int = 0,
    ) -> None:
        self.config, self.known, self.seed, self._advance = config, known, seed, advance
        self.trials: list[Trial] = []
        ranks = config.traffic.ranks
        self.sizes = tuple(known.delta_bytes + rank * known.rank_bytes for rank in ranks)
        self._factor = 1.1  # replicas have not all equally many deltas

    @cached_property
    def shares(self) -> Floats:
        """The share of calls of each delta."""
        return zipf_shares(self.config.traffic.deltas, self.config.traffic.zipf)

    def plan(self) -> Trial:
        """The fleet to take: the smallest that meets the targets, or that of the options with what it misses.

        SpecError where no number of replicas meets them.
        """
        hardware, traffic = self.config.hardware, self.config.traffic
        if hardware.replicas is not None:
            return self.tried(hardware.replicas)
        self._check_alone()
        few = math.ceil(traffic.rate * traffic.mean_tokens / self.known.times().rate) - 1
        trial = self.tried(min(few + 1, hardware.most_replicas))
        while trial.missed:
            if trial.replicas >= hardware.most_replicas or trial.busy < IDLE:
                raise SpecError(
                    f"{trial.replicas} replicas, each busy {trial.busy:.0%} of the time, miss "
                    f"{', '.join(trial.missed)}; expected targets that a call can meet, or more --most-replicas"
                )
            few = trial.replicas
            trial = self.tried(min(max(few + 1, math.ceil(REPLICAS * few)), hardware.most_replicas))
        while trial.replicas - few > max(1, few // 50):
            middle = self.tried((few + trial.replicas) // 2)
            few, trial = (middle.replicas, trial) if middle.missed else (few, middle)
        return trial

    def tried(self, replicas: int) -> Trial:
        """So many replicas, with as much memory as is given or, where it is not, as meets the targets."""
        trial = self._trial(replicas)
        while trial.lacks == "memory" and self.config.hardware.device_mb is None and not self._all_fit(replicas):
            self._factor *= MEMORY
            trial = self._trial(replicas)
        return trial

    def _check_alone(self) -> None:
        """SpecError for times that a call does not meet where nothing waits."""
        traffic, known, times = self.config.traffic, self.known, self.known.times()
        for name, place in (("p50_ms", 0.0), ("p99_ms", NormalDist().inv_cdf(0.99))):
            wanted = getattr(self.config.targets, name)
            length = traffic.mean_tokens * math.exp(traffic.spread * place - traffic.spread**2 / 2)
            alone = 1e3 * (known.call_seconds + times.seconds(times.size(length, length**2)))
            if wanted is not None and wanted < alone:
                raise SpecError(f"{name} is {wanted:g}; a call of {length:.0f} tokens takes {alone:.3g} ms alone")

    def device_mb(self, replicas: int) -> float:
        """Memory of each replica for deltas."""
        given, sizes = self.config.hardware.device_mb, np.array(self.sizes)
        if given is not None:
            return given
        needed = int(self.shares.cumsum().searchsorted(self.config.targets.hit_rate)) + 1
        deltas = min(math.ceil(self._factor * needed / replicas) + 1, self.config.traffic.deltas)
        return float(max(deltas * sizes.mean(), sizes.max())) / MB

    def _all_fit(self, replicas: int) -> bool:
        return self.device_mb(replicas) * MB >= self.config.traffic.deltas * float(np.mean(self.sizes))

    def _trial(self, replicas: int) -> Trial:
        traffic, hardware, device = self.config.traffic, self.config.hardware, self.device_mb(replicas)
        fleet = SimulatedFleet(replicas, self.known, Memory(device * MB, hardware.host_mb * MB, self.sizes))
        count = min(max(LEAST, EACH * replicas), MOST)
        fleet.settle(self.shares, traffic.rate * traffic.mean_tokens)
        calls = Calls.drawn(
            traffic.rate, count, self.shares, traffic.mean_tokens, traffic.spread, traffic.longest, self.seed
        )
        found = fleet.run(calls).after(WARM)
        targets, hit = self.config.targets, float(found.hit.mean())
        p50, p99 = found.milliseconds
        meets = {
            "p50_ms": targets.p50_ms is None or p50 <= targets.p50_ms,
            "p99_ms": targets.p99_ms is None or p99 <= targets.p99_ms,
            "hit_rate": hit >= targets.hit_rate,
            "refused": not found.refused,
            "calls": found.throughput >= 0.95 * traffic.rate,
        }
        missed, busy = [name for name, met in meets.items() if not met], found.busy / (replicas * found.seconds)
        near = replace(found, latency=found.latency[found.hit]).milliseconds  # what no load of a delta holds up
        slow = any(
            wanted is not None and ms > wanted
            for wanted, ms in zip((targets.p50_ms, targets.p99_ms), near, strict=True)
        )
        resident = sum(len(one.device) for one in fleet.replicas.values()) / replicas
        cost = hardware.replica_cost * replicas
        trial = Trial(
            replicas, device, round(resident), hit, p50, p99, found.throughput, found.refused, busy, cost,
            cost / (3600 * traffic.rate) * 1e6, tuple(missed),
            "" if not missed else "replicas" if slow or busy > BUSY else "memory",
        )  # fmt: skip
        self.trials.append(trial)
        self._advance(trial)
        return trial


def as_dict(planner: Planner, chosen: Trial, seconds: float) -> JsonObject:
    """The whole plan, ready for JSON; ``seconds`` is how long it took to make."""
    known = planner.known
    return {
        "plan": asdict(chosen),
        "trials": [asdict(one) for one in planner.trials],
        "traffic": asdict(planner.config.traffic),
        "hardware": asdict(planner.config.hardware),
        "targets": asdict(planner.config.targets),
        "calibration": asdict(known),
        "seconds": seconds,
    }


def draw(trials: Sequence[Trial], targets: TargetConfig, path: Path) -> None:
    """Latency, and how busy replicas are, by their number. Unsupported without matplotlib."""
    from bertology_serve.analysis.figures import Figure, LineChart
    from bertology_serve.analysis.figures import draw as write

    by_number = sorted({one.replicas: one for one in trials}.values(), key=lambda one: one.replicas)
    x = [float(one.replicas) for one in by_number]
    latency = {"p50": [one.p50_ms for one in by_number], "p99": [one.p99_ms for one in by_number]}
    shares = {"resident": [one.hit_rate for one in by_number], "busy": [one.busy for one in by_number]}
    panels = [
        LineChart("Time of a call", x, latency, "replicas", "ms", level=targets.p99_ms, level_name="p99 wanted"),
        LineChart("Calls that meet a resident delta; time in batches", x, shares, "replicas", "share"),
    ]
    write(Figure("Replicas tried", panels), path)
