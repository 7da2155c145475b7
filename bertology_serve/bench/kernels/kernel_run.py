"""Runs the kernel benchmark: a sweep of workloads, or a search for the configurations of a tuning table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from bertology_serve.bench.kernels.gpu_timing import Ceilings, ceilings, compare, machine, sets_needed
from bertology_serve.bench.kernels.kernel_report import Figure, floor_ratio
from bertology_serve.bench.kernels.methods import BASELINE, OURS, PLAIN, chosen, exact, form, methods
from bertology_serve.bench.kernels.workload import Inputs, Workload, batch_segments, inputs
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.kernels.columns import tile_columns
from bertology_serve.kernels.dispatch import LinearPath, architecture
from bertology_serve.kernels.tuning import FUSED, SPLIT, TORCH, Config, Point, Row, Table, table

CHECKED_ROWS = 512
ALLOWED = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-5}
Say = Callable[[str], None]


def cuda() -> torch.device:
    """The GPU that is measured; raises Unsupported on a machine without one, or without Triton."""
    if not torch.cuda.is_available():
        raise Unsupported(
            "no CUDA GPU: this benchmark measures Triton kernels on one (sm_80 or newer), and torch "
            f"{torch.__version__} sees none; run it on a machine that has one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    arch, reason = architecture(device)
    if not arch:
        raise Unsupported(f"no kernels to measure: {reason}")
    return device


def measure(workloads: Iterable[Workload], device: torch.device, also: str = "") -> Iterator[list[Figure]]:
    """The figures of each workload, after a comparison with float64. Raises VerificationError where one is wrong."""
    limits: dict[str, Ceilings] = {}
    for workload in workloads:
        if workload.dtype not in limits:
            limits[workload.dtype] = ceilings(device, getattr(torch, workload.dtype))
        yield _figures(workload, device, limits[workload.dtype], also)


@torch.inference_mode()
def _figures(workload: Workload, device: torch.device, limits: Ceilings, also: str) -> list[Figure]:
    segments = batch_segments(workload)
    first = inputs(workload, device, 0)
    calls = methods(workload, segments, device, also)
    want = exact(first, segments, min(CHECKED_ROWS, workload.rows))
    errors = {}
    for name, call in calls.items():
        if name not in (BASELINE, PLAIN):
            got = call(first)[: want.shape[0]].double()
            errors[name] = float((got - want).norm() / want.norm())
    if not errors[OURS] <= ALLOWED[workload.dtype]:
        raise VerificationError(f"error {errors[OURS]:.2e} against float64 on {workload}; no time was taken")
    count = sets_needed(first.bytes, device)
    times = compare(calls, [first, *(inputs(workload, device, seed) for seed in range(1, count))])
    plan_us, upload_us = _plan_time(workload, device)
    how = chosen(workload, segments, device)
    base = times[BASELINE].median
    return [
        Figure(
            workload,
            name,
            f"{how.form} {_short(how.config)}" if name == OURS else "",
            spread,
            spread.median / base,
            1.0 if name in (BASELINE, PLAIN) else floor_ratio(workload, segments, limits, first.x.element_size()),
            errors.get(name, math.nan),
            plan_us,
            upload_us,
        )
        for name, spread in times.items()
    ]


def _plan_time(workload: Workload, device: torch.device) -> tuple[float, float]:
    """Microseconds to make a batch's column lists, and to bring them to the GPU."""
    segments = batch_segments(workload)
    tile_columns([segments], workload.rows, 128)
    begin = time.perf_counter()
    columns = tile_columns([segments], workload.rows, 128)
    made = time.perf_counter()
    columns.to(device)
    torch.cuda.synchronize()
    return (made - begin) * 1e6, (time.perf_counter() - made) * 1e6


def _short(config: Config) -> str:
    return (
        f"{config.block_m}x{config.block_n}x{config.block_k} RT{config.rank_tile} q{config.sweep} "
        f"w{config.warps} s{config.stages}{' tma' if config.tma else ''}{' persistent' if config.persistent else ''}"
    )


def candidates(row: Row, hopper: bool) -> Iterator[LinearPath]:
    """The forms and configurations that tuning tries at a point, the present one first."""
    yield LinearPath(row.form, row.config, "present")
    yield LinearPath(TORCH, row.config, "torch")
    if row.point.dtype != "half":
        return
    ranks = row.config.rank_tile
    tiles = ((64, 64, 4), (64, 128, 4), (64, 256, 8), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for block_m, block_n, warps in tiles if hopper else tiles[:2] + tiles[3:6]:
        for stages in (3, 4) if hopper else (3,):
            for sweep in (1, 3, 4) if block_n == 128 and hopper else (1,):
                config = Config(block_m, block_n, 64 if hopper else 32, ranks, sweep, warps, stages, hopper)
                for kind in (FUSED, SPLIT) if row.point.columns else (FUSED,):
                    yield LinearPath(kind, config, "tried")
                    if hopper and sweep == 1 and kind == SPLIT:
                        yield LinearPath(kind, replace(config, persistent=True), "tried")


def tune(device: torch.device, wanted: Callable[[Row], bool], say: Say) -> Table:
    """The committed table with the rows that ``wanted`` picks measured anew: the fastest candidate at each.

    Rows of three slices take what is fastest for one slice of the same N.
    """
    arch, _ = architecture(device)
    old = table(arch)
    found: dict[Point, Row] = {}
    for row in old.rows:
        if wanted(row) and row.point.slices == 1:
            found[row.point] = _tuned(row, device, arch == "sm_90")
            say(f"{row.point}: {found[row.point].form} {_short(found[row.point].config)}")
    rows = tuple(replace(found.get(replace(row.point, slices=1), row), point=row.point) for row in old.rows)
    about = machine(device) | {"points": f"{len(found)} of {sum(row.point.slices == 1 for row in old.rows)}"}
    return replace(old, rows=rows, measured=about)


@torch.inference_mode()
def _tuned(row: Row, device: torch.device, hopper: bool) -> Row:
    point, workload = row.point, _workload(row)
    segments = batch_segments(workload) if point.columns else []
    sets: list[Inputs] = [inputs(workload, device, seed) for seed in range(2)]
    want = exact(sets[0], segments, min(CHECKED_ROWS, workload.rows))
    best, fastest = row, math.inf
    for choice in candidates(row, hopper):
        try:
            call = form(choice, workload, segments, device)
            got = call(sets[0])[: want.shape[0]].double()
            taken = compare({choice.why: call}, sets)[choice.why].median
        except Exception as problem:  # a configuration that this GPU has no room for
            if "out of resource" not in str(problem).lower():
                raise
            continue
        right = float((got - want).norm() / want.norm()) <= ALLOWED[workload.dtype]
        if right and taken < fastest:
            best, fastest = Row(point, choice.form, choice.config), taken
    return best


def _workload(row: Row) -> Workload:
    """Deltas whose ranks fill the columns of a point: one delta a tile on average, and two in every other tile."""
    point = row.point
    rank = max(4, point.columns * 2 // 3)
    deltas = max(1, point.rows // 256)
    dtype = "bfloat16" if point.dtype == "half" else "float32"
    return Workload(point.k, point.n, point.rows, rank, deltas, dtype=dtype)
