"""The results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.train_vs_peft.works import OPTIONS, SETS
from bertology_serve.data.sets import set_named

HEADER = (
    "| method | set | metric | ours | peft + Trainer | tokens/s, ours over peft's | a processor second |",
    "|---|---|---|---|---|---|---|",
)
Run = Mapping[str, Any]


def table(found: Mapping[str, Run]) -> str:
    """Metrics over seeds, and the ratio of speeds: the median over pairs of runs, and its ends."""
    lines = [*HEADER]
    for method in OPTIONS:
        for name in SETS:
            pairs = _pairs(found, f"{method}/{name}/")
            if pairs:
                lines.append(f"| {method} | {name} | {_cells(name, pairs)} |")
    facts = sorted({run["facts"] for run in found.values()})
    return "\n".join([*lines, "", *(f"{fact}.  " for fact in facts), ""])


def _pairs(found: Mapping[str, Run], cell: str) -> list[tuple[Run, Run]]:
    """(ours, theirs) of each seed that both have finished."""
    seeds = sorted({key.split("/")[2] for key in found if key.startswith(cell)}, key=int)
    both = [[found.get(f"{cell}{seed}/{side}") for side in ("ours", "peft")] for seed in seeds]
    return [(mine, other) for mine, other in both if mine and other]


def _cells(name: str, pairs: Sequence[tuple[Run, Run]]) -> str:
    metric = set_named(SETS[name][0]).metrics[0]
    mine, other = ([100 * run["metrics"][metric] for run in side] for side in zip(*pairs, strict=True))
    return " | ".join([metric, _mean(mine), _mean(other), _ratios(pairs, "seconds"), _ratios(pairs, "cpu")])


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({len(values)})"


def _ratios(pairs: Sequence[tuple[Run, Run]], clock: str) -> str:
    """Ours over theirs, in tokens a second."""
    ratios = [mine["tokens"] / mine[clock] / (other["tokens"] / other[clock]) for mine, other in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
