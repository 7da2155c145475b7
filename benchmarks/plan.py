"""The planner beside what it plans: two replicas and a router of this machine, and the same in the simulation.

``python -m benchmarks.plan --output benchmarks/results`` (about four minutes on two cores). Every round calibrates a
third server, which is idle otherwise, before and after real calls, so that what else the machine does is in both. Two
replicas, a router and a client want more than two cores: with ``--device`` batches take their time without a core, as
on a device of their own, and all else is as ever.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.router import ROOM, Fleet, routed
from bertology_serve.bench.prove.cores import ONE_THREAD
from bertology_serve.bench.prove.stage import ADMIN, WORDS, Served, Stage, serving
from bertology_serve.bench.prove.traffic import closed, opened, predict
from bertology_serve.bench.serving.calibrate import HOT, further, timed
from bertology_serve.export.installation import environment
from bertology_serve.scale import simulation
from bertology_serve.scale.simulation import Calls, Memory, ReplicaCosts, zipf_shares
from bertology_serve.serving.keys import ADMIN_KEYS

DELTAS, ZIPF, RATE, CLIENTS = 200, 1.1, 30.0, 16
MEAN, SPREAD, WORDS_AT_MOST = 16, 0.6, 40  # words of a text
SPECIAL = 2  # tokens beside them
SHARES = zipf_shares(DELTAS, ZIPF)
BAR = 0.15
FIXED, TOKEN = 0.02, 0.0005  # seconds of a batch on the device


def figures(seconds: Sequence[float], hit_rate: float, throughput: float) -> dict[str, float]:
    """What is compared of one round: times and hits of calls that come by themselves, answers a second to clients."""
    p50, p99 = (float(one) for one in np.quantile(1e3 * np.array(seconds), (0.5, 0.99)))
    return {"p50_ms": p50, "p99_ms": p99, "hit_rate": hit_rate, "calls_per_second": throughput}


class WithDevice(Stage):
    """Servers whose batches take ``FIXED + TOKEN`` a token on a device that does nothing else, nor anything at all."""

    @contextmanager
    def server(self, deltas: Path, *options: str, environ: Mapping[str, str] | None = None) -> Iterator[Served]:
        """``bertology-serve serve``, patched."""
        command = [sys.executable, "-m", "benchmarks.plan", "serve", "--backbone", self.backbone, "--port", "0",
                   "--deltas", str(deltas), "--log-level", "error", *options]  # fmt: skip
        own = {ADMIN_KEYS: ADMIN, "BERTOLOGY_CACHE": str(self.directory / "cache"), **(environ or {})}
        with serving(command, own) as served:
            yield served


def serve_with_device(arguments: list[str]) -> int:
    """The command line, with that device."""
    from bertology_serve.cli.main import main
    from bertology_serve.encoder.pipeline import LoadedDelta, Pipeline
    from bertology_serve.serving.execution.channel import shape_of
    from bertology_serve.tasks.spec import Encoding

    def outputs(self: Pipeline, owned: Sequence[tuple[LoadedDelta, Encoding]]) -> list[torch.Tensor]:
        time.sleep(FIXED + TOKEN * sum(len(encoding) for _, encoding in owned))
        hidden = self.encoder.anatomy.hidden
        return [torch.zeros(shape_of(ready.delta, encoding, hidden)) for ready, encoding in owned]

    Pipeline.outputs = outputs  # type: ignore[method-assign]
    return main(arguments)


def drawn(seed: int) -> Iterator[tuple[int, int]]:
    """The rank of a call's delta and the words of its text, one call after the other."""
    draw = random.Random(seed)
    while True:
        length = draw.lognormvariate(math.log(MEAN) - SPREAD**2 / 2, SPREAD)
        yield draw.choices(range(DELTAS), SHARES)[0], min(max(1, round(length)), WORDS_AT_MOST)


def asked(seed: int) -> Callable[[], bytes]:
    """Those calls."""
    calls, draw = drawn(seed), random.Random(-seed)
    return lambda: predict(f"d{(call := next(calls))[0]}", " ".join(draw.choices(WORDS, k=call[1])))


def expected(seed: int, count: int, start: float, clients: int = 0) -> Calls:
    """The same for the simulation, when ``opened`` sends them."""
    ranks, words = (np.array(column) for column in zip(*islice(drawn(seed), count), strict=True))
    draw = random.Random(seed)
    due = start + np.cumsum([0.0, *(draw.expovariate(RATE) for _ in range(count - 1))])
    return Calls(due, ranks, words + SPECIAL, clients)


class Pair:
    """Two replicas, real and simulated, that are asked the same; the figures of each round."""

    def __init__(self, fleet: Fleet, url: str, model: simulation.SimulatedFleet) -> None:
        self.fleet, self.url, self.model = fleet, url, model
        self.real, self.simulated = list[dict[str, float]](), list[dict[str, float]]()

    def ask(
        self, seed: int, seconds: float, clients: int, before: ReplicaCosts, look: Callable[[], ReplicaCosts]
    ) -> ReplicaCosts:
        """One round of calls; the simulated ones once it has been looked how long things take. What was found."""
        loads, began = self.fleet.metric("bertology_delta_loads_total"), time.perf_counter()
        own = asyncio.run(opened(self.url, asked(seed), RATE, seconds, seed)).answered
        hit = 1 - (self.fleet.metric("bertology_delta_loads_total") - loads) / len(own)
        middle = time.perf_counter()
        again = asyncio.run(closed(self.url, asked(seed + 1000), clients, seconds / 3)).answered
        passed = time.perf_counter() - middle
        self.real.append(figures(own, hit, len(again) / passed))
        after, model = look(), self.model
        model.calibration = between(before, after)
        model.times.start([(round(tokens), round(squares), took) for tokens, squares, took in model.calibration.ladder])
        start = model.now + middle - began
        alone = model.run(expected(seed, len(own), model.now))
        model.now = max(model.now, start)
        together = model.run(expected(seed + 1000, len(again), 0, clients))
        model.now += time.perf_counter() - middle - passed
        self.simulated.append(figures(alone.latency.tolist(), float(alone.hit.mean()), together.throughput))
        return after


def between(before: ReplicaCosts, after: ReplicaCosts) -> ReplicaCosts:
    """The mean of two."""
    one, other = (np.array(known.ladder) for known in (before, after))
    times = ("call_seconds", "route_seconds", "load_seconds", "lift_seconds")
    mean = {name: (getattr(before, name) + getattr(after, name)) / 2 for name in times}
    return ReplicaCosts(tuple(map(tuple, ((one + other) / 2).tolist())), **mean)


def calibrated(url: str, routed: str) -> ReplicaCosts:
    """As ``bench serving --calibration`` finds it."""
    found = timed(url, 0.5) | {"route_seconds": asyncio.run(further(url, routed, 0.5))}
    return msgspec.convert(found, ReplicaCosts)


def main() -> None:
    """Measures all of it and writes table and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--device", action="store_true", help="batches take their time without a core")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)
    found: dict[str, Any] = environment() | {"rounds": []}
    with tempfile.TemporaryDirectory() as folder:
        stage = (WithDevice if options.device else Stage)(options.backbone, Path(folder), quick=True)
        root = Path(folder) / "deltas"
        for rank in range(DELTAS):
            stage.save(root, f"d{rank}", "1", rank, like="mood")
        size = sum(path.stat().st_size for path in root.rglob("*.safetensors")) // DELTAS
        room, few = (math.ceil(count * size / 2**20) for count in (ROOM * DELTAS, HOT + 2))
        limits = ("--host-mb", "0", "--engine", "torch")
        with (
            Fleet(stage, root, 2, "--device-mb", str(room), *limits) as fleet,
            routed(fleet.urls) as router,
            stage.server(root, "--device-mb", str(few), *limits, environ=ONE_THREAD) as alone,
            routed([alone.url]) as way,
        ):
            before = calibrated(alone.url, way.url)
            model = simulation.SimulatedFleet(2, before, Memory(room * 2**20, 0, (size,)))
            warming = Pair(fleet, router.url, model)
            warming.ask(99, 2 * options.seconds, CLIENTS, before, lambda: before)
            pair = Pair(fleet, router.url, model)
            for number in range(options.rounds):
                before = pair.ask(number, options.seconds, CLIENTS, before, lambda: calibrated(alone.url, way.url))
                times = before.times()
                row = {
                    "load": os.getloadavg()[0], "fixed_ms": 1e3 * times.fixed, "token_us": 1e6 * times.per_token,
                    "call_ms": 1e3 * before.call_seconds, "route_ms": 1e3 * before.route_seconds,
                    "load_ms": 1e3 * before.load_seconds, "real": pair.real[-1], "simulated": pair.simulated[-1],
                }  # fmt: skip
                found["rounds"].append(row)
                print(json.dumps(row), flush=True)
    found["middle"] = {
        name: {"real": median(one[name] for one in pair.real), "simulated": median(one[name] for one in pair.simulated)}
        for name in pair.real[0]
    }
    found["device"] = options.device
    page = table(found)
    print(page)
    if options.output:
        name = "plan-device" if options.device else "plan"
        (options.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.output / f"{name}.md").write_text(page)


def table(found: dict[str, Any]) -> str:
    """The medians over the rounds, and how far apart they are."""
    loads = [one["load"] for one in found["rounds"]]
    where = f"{found['cpu']}, {found['date']}, load {min(loads):.1f} to {max(loads):.1f}"
    lines = [f"| {len(loads)} rounds, {where} | measured | simulated | error (bar {BAR:.0%}) |", "|---|---|---|---|"]
    for name, one in found["middle"].items():
        apart = one["simulated"] / one["real"] - 1
        lines.append(f"| {name} | {one['real']:.4g} | {one['simulated']:.4g} | {apart:+.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve_with_device(sys.argv[1:]))
    main()
