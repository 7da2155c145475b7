"""``bertology-serve plan``: how many servers given calls need."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bertology_serve.cli.common import note, table
from bertology_serve.cli.options import laid_out, options
from bertology_serve.errors import SpecError
from bertology_serve.files import check_outputs, write_json
from bertology_serve.scale.config import PlanConfig

Measured = Annotated[Path, typer.Option(help="What bench serving --calibration wrote, on this machine or another.")]
Seed = Annotated[int, typer.Option(help="Seed of the simulated calls.")]
Output = Annotated[Path | None, typer.Option(help="Write everything to this .json file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw what was tried there (.png).")]
COMMON = (
    "calibration", "deltas", "calls", "tokens", "ranks", "zipf", "mean_tokens", "replicas", "device_mb", "replica_cost",
    "p50_ms", "p99_ms", "hit_rate", "output", "plot",
)  # fmt: skip


@laid_out(COMMON, {"What it reads and writes": ("calibration", "seed", "output", "plot")})
@options(PlanConfig)
def plan(calibration: Measured, config: PlanConfig, seed: Seed = 0, output: Output = None, plot: Plot = None) -> None:
    """Find how many replicas, with how much memory for deltas, answer given calls within given times.

    Simulates router, queues, batches and memory with the policies that serve, on the times that bench serving
    --calibration measured. Without --replicas it looks for the fewest that meet the targets.
    """
    for path, suffix in ((output, ".json"), (plot, ".png")):
        if path is not None and path.suffix != suffix:
            raise SpecError(f"cannot write {path}: expected a name that ends in {suffix}")
    check_outputs((output, plot), (calibration,))
    from bertology_serve.scale.planner import Planner, as_dict, draw, read_calibration

    started = time.monotonic()
    planner = Planner(config, read_calibration(calibration), lambda one: note(f"{one.fleet}: {one.says}"), seed)
    chosen, seconds = planner.plan(), time.monotonic() - started
    table(
        f"{config.traffic.deltas:,} deltas, {config.traffic.rate:,.6g} calls/s",
        ("replicas", "MiB for deltas", "resident", "hit rate", "p50 ms", "p99 ms", "calls/s", "busy", "cost/h",
         "per million", "misses"),
        [(one.replicas, one.device_mb, one.resident_deltas, one.hit_rate, one.p50_ms, one.p99_ms, one.calls_per_second,
          one.busy, one.cost_per_hour, one.cost_per_million, ", ".join(one.missed)) for one in planner.trials],
        stderr=False,
    )  # fmt: skip
    cost = f", {chosen.cost_per_hour:,.6g} an hour" if chosen.cost_per_hour else ""
    note(f"{chosen.fleet} with {chosen.device_mb:,.4g} MiB for deltas each{cost}: {chosen.says}")
    if output is not None:
        write_json(output, as_dict(planner, chosen, seconds))
    if plot is not None:
        draw(planner.trials, config.targets, plot)
