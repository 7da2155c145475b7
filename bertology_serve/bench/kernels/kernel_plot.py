"""The kernel benchmark as a picture: ratio to cuBLAS alone over T, and over the number of deltas. Needs matplotlib."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bertology_serve.bench.kernels.kernel_report import Figure
from bertology_serve.bench.kernels.workload import Workload
from bertology_serve.errors import Unsupported

STYLES = {  # colours that the colour-blind can tell apart
    "ours": ("#0072B2", "o", "-"),
    "floor": ("#000000", "", ":"),
    "own_base": ("#56B4E9", "v", "--"),
    "cublas_pair": ("#D55E00", "s", "-"),
    "torch_loop": ("#009E73", "^", "-"),
    "grouped_mm": ("#CC79A7", "D", "-"),
    "merged": ("#E69F00", "P", "-"),
}
OTHER = ("#999999", "X", "-")
Line = list[tuple[int, float]]


def check(path: Path | None) -> None:
    """Raises Unsupported where the picture could not be drawn; before the work, not after it."""
    if path is not None and find_spec("matplotlib") is None:
        raise Unsupported("--plot needs matplotlib, which is not installed; take the extra bertology-serve[plots]")


def over_rows(figures: Iterable[Figure]) -> dict[str, Line]:
    """Each method's ratio (geometric mean over shapes) at every T, for 64 deltas of rank 16."""
    return _lines(figures, lambda w: w.rows, lambda w: w.deltas == 64)


def over_deltas(figures: Iterable[Figure], rows: int = 16384) -> dict[str, Line]:
    """The same at every number of deltas, for one T."""
    return _lines(figures, lambda w: w.deltas, lambda w: w.rows == rows)


def draw(figures: Sequence[Figure], about: Mapping[str, str], path: Path) -> None:
    """Writes the PNG, 150 dots an inch."""
    check(path)
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(12.5, 5.0), dpi=150, layout="constrained")
    left, right = canvas.subplots(1, 2)
    _panel(left, over_rows(figures), "64 deltas of rank 16", "T, rows of the packed batch")
    _panel(right, over_deltas(figures), "T = 16,384, rank 16", "deltas")
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    canvas.suptitle(
        "One linear with the deltas of a batch: time ÷ cuBLAS without deltas, geometric mean over shapes\n"
        + ", ".join(f"{key} {value}" for key, value in about.items()),
        fontsize=10,
    )
    canvas.savefig(path)


def _lines(
    figures: Iterable[Figure], axis: Callable[[Workload], int], wanted: Callable[[Workload], bool]
) -> dict[str, Line]:
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for figure in figures:
        work = figure.workload
        if work.rank == 16 and (work.mix, work.lengths) == ("uniform", "lognormal") and wanted(work):
            if figure.method != "cublas":
                found[figure.method][axis(work)].append(figure.ratio)
            if figure.method == "ours":
                found["floor"][axis(work)].append(figure.floor)
    return {
        name: [(at, math.exp(sum(map(math.log, ratios)) / len(ratios))) for at, ratios in sorted(points.items())]
        for name, points in found.items()
    }


def _panel(axis: Any, lines: Mapping[str, Line], title: str, label: str) -> None:
    for name, line in lines.items():
        colour, marker, dash = STYLES.get(name, OTHER)
        axis.plot(*zip(*line, strict=True), color=colour, marker=marker or None, linestyle=dash, label=name)
    axis.axhline(1.0, color="#BBBBBB", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel(label)
    axis.set_ylabel("time ÷ cuBLAS without deltas")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
