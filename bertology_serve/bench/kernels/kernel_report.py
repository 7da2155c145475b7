"""What a measurement says: time, ratio to cuBLAS alone, the floor under that ratio, and the gap between the two."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bertology_serve.bench.kernels.gpu_timing import Ceilings, Spread
from bertology_serve.bench.kernels.workload import Workload
from bertology_serve.kernels.segments import RowSegment


@dataclass(frozen=True)
class Figure:
    """One method on one workload. Times in microseconds; ``error`` is the relative Frobenius one against float64.

    ``plan_us`` and ``upload_us`` are paid once for a batch, not for every linear, and are not in the other times.
    """

    workload: Workload
    method: str
    how: str
    time: Spread
    ratio: float
    floor: float
    error: float
    plan_us: float = 0.0
    upload_us: float = 0.0

    @property
    def gap(self) -> float:
        """How far the ratio is from its floor."""
        return self.ratio / self.floor


def floor_ratio(workload: Workload, segments: Sequence[RowSegment], ceilings: Ceilings, size: int = 2) -> float:
    """The least time with deltas over the least without: more operations or more bytes, whichever is slower.

    ``size`` is bytes of an element. Only pool rows that the batch uses are read, each once.
    """
    base_flops = 2 * workload.rows * workload.k * workload.n
    base_bytes = size * (workload.rows * (workload.k + workload.n) + workload.k * workload.n)
    width = workload.k + workload.n
    extra_flops = sum(2 * (s.hi - s.lo) * (s.last - s.first) * width for s in segments)
    used = {row for s in segments for row in range(s.first, s.last)}
    base = max(base_flops / ceilings.flops, base_bytes / ceilings.bytes)
    whole = max((base_flops + extra_flops) / ceilings.flops, (base_bytes + size * len(used) * width) / ceilings.bytes)
    return whole / base


COLUMNS = ("K", "N", "T", "rank", "deltas", "mix", "lengths", "method", "us", "ratio", "floor", "gap", "error", "how")


def lines(figures: Iterable[Figure]) -> list[str]:
    """The printed table."""
    cells = [COLUMNS] + [
        (
            *map(str, (f.workload.k, f.workload.n, f.workload.rows, f.workload.rank, f.workload.deltas)),
            *(f.workload.mix, f.workload.lengths, f.method),
            *(f"{f.time.median:.1f}", f"{f.ratio:.3f}", f"{f.floor:.3f}", f"{f.gap:.3f}", f"{f.error:.1e}", f.how),
        )
        for f in figures
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def losses(figures: Sequence[Figure], ours: str, base: str) -> list[str]:
    """One line for every workload in which another method was faster than ours (the base alone does less work)."""
    best = {f.workload: f for f in figures if f.method == ours}
    return [
        f"slower than {f.method}: K {f.workload.k}, N {f.workload.n}, T {f.workload.rows}, rank {f.workload.rank}, "
        f"{f.workload.deltas} deltas: {best[f.workload].time.median:.1f} against {f.time.median:.1f} us"
        for f in figures
        if f.method not in (ours, base, "own_base")
        and f.workload in best
        and f.time.median < best[f.workload].time.median
    ]


def write_csv(path: Path, figures: Iterable[Figure], machine: Mapping[str, str]) -> None:
    """Every figure with its spread and the machine beside it."""
    rows = [
        {**asdict(f.workload), "method": f.method, "how": f.how, **{f"us_{k}": v for k, v in asdict(f.time).items()}}
        | {"ratio": f.ratio, "floor": f.floor, "gap": f.gap, "error": f.error}
        | {"plan_us": f.plan_us, "upload_us": f.upload_us, **machine}
        for f in figures
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ())
        writer.writeheader()
        writer.writerows(rows)
