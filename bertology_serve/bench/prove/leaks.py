"""Figure 5: loading and unloading leaves nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from statistics import linear_regression

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import ZOO, Stage
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.serving.versions.delta_registry import Registry

BOUND = 1024.0  # bytes of RSS a cycle


def measure(stage: Stage) -> Measured:
    """Cycles of put and remove through all of the zoo; the slope of RSS over the latter three quarters."""
    cycles = stage.count(400, 1000)
    pipeline = Pipeline(stage.encoder)
    registry = Registry(pipeline, stage.zoo)
    names = list(ZOO)
    points: list[tuple[int, int]] = []
    before = 0
    for cycle in range(cycles):
        name = names[cycle % len(names)]
        registry.put(name)
        registry.remove(name)
        if cycle == cycles // 4:
            before = pipeline.bank.bytes
        if cycle >= cycles // 4 and cycle % 10 == 0:
            gc.collect()
            points.append((cycle, resident()))
    device = pipeline.bank.bytes - before
    slope = linear_regression(*zip(*points, strict=True)).slope
    words = f"device {device:+d} bytes; RSS {slope:+.0f} bytes a cycle over {cycles} cycles"
    return Measured(words, device == 0 and slope < BOUND, {"device": device, "slope": slope, "cycles": cycles})


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
