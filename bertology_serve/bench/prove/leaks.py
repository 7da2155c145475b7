"""Figures 5 and 19: loading and unloading leaves nothing behind; what a start takes, in time and memory."""

from __future__ import annotations

import gc
from pathlib import Path
from statistics import linear_regression

from bertology_serve.bench.prove.cores import resident_bytes
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import ZOO, Stage
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.files import CACHE
from bertology_serve.serving.versions.delta_registry import Registry

BOUND = 1024.0  # bytes of RSS a cycle
TASKS, FIRST, LATER, MOST = 32, 7.0, 3.5, 400e6  # deltas; CPU seconds of a first start and of a later one; bytes


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


def start(stage: Stage) -> Measured:
    """Servers with 32 LoRAs on the ONNX engine that begin before anything is kept, and after: CPU seconds until they
    answer, the least of the later ones, and the memory that one takes then."""
    root, kept = stage.directory / "start", {CACHE: str(stage.directory / "kept")}
    for number in range(stage.count(TASKS, TASKS)):
        stage.save(root, f"task-{number}", "1", number, like="mood")
    seconds, memory = list[float](), 0
    for _ in range(1 + stage.rounds):
        with stage.server(root, "--engine", "onnx", environ=kept) as server:
            seconds.append(server.cpu)
            memory = resident_bytes(server.pid)
    first, later = seconds[0], min(seconds[1:])
    words = f"{first:.1f} and {later:.1f} s of CPU, {memory / 1e6:.0f} MB"
    holds = first <= FIRST and later <= LATER and memory <= MOST
    return Measured(words, holds, {"first": first, "later": later, "bytes": memory})


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
