"""The results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.train_vs_peft.works import OPTIONS, SETS
from bertology_serve.data.sets import set_named

HEADER = (
    "| method | set | metric | ours | peft + Trainer | ours, mean of rows | tokens a processor second, over peft's |",
    "|---|---|---|---|---|---|---|",
)
Run = Mapping[str, Any]
FIRST = "minilm"


def tables(found: Mapping[str, Run]) -> str:
    """One table an encoder, its name above it; a key of MiniLM's runs does not begin with one."""
    encoders: dict[str, dict[str, Run]] = {}
    for key, run in found.items():
        *encoder, method, name, seed, side = key.split("/")
        encoders.setdefault(encoder[0] if encoder else FIRST, {})[f"{method}/{name}/{seed}/{side}"] = run
    return "\n".join(f"## {encoder}\n\n{table(runs)}" for encoder, runs in encoders.items())


def table(found: Mapping[str, Run]) -> str:
    """Metrics over seeds, and the ratio of speeds: the median over pairs of runs, and its ends."""
    lines = [*HEADER]
    for method in OPTIONS:
        for name in SETS:
            pairs, pooled = _pairs(found, f"{method}/{name}/"), _runs(found, f"{method}/{name}/", "mean")
            if pairs:
                lines.append(f"| {method} | {name} | {_cells(name, pairs, pooled)} |")
    facts = sorted({run["facts"] for run in found.values()})
    return "\n".join([*lines, "", *(f"{fact}.  " for fact in facts), ""])


def _pairs(found: Mapping[str, Run], cell: str) -> list[tuple[Run, Run]]:
    """(ours, theirs) of each seed that both have finished."""
    mine, other = (_runs(found, cell, side) for side in ("ours", "peft"))
    return [(mine[seed], other[seed]) for seed in mine if seed in other]


def _runs(found: Mapping[str, Run], cell: str, side: str) -> dict[int, Run]:
    """The runs of one side by seed."""
    keys = [key.split("/") for key in found if key.startswith(cell)]
    return {int(seed): found[f"{cell}{seed}/{side}"] for *_, seed, other in keys if other == side}


def _cells(name: str, pairs: Sequence[tuple[Run, Run]], pooled: Mapping[int, Run]) -> str:
    metric = set_named(SETS[name][0]).metrics[0]
    sides = (*zip(*pairs, strict=True), pooled.values())
    return " | ".join(
        [metric, *(_mean([100 * run["metrics"][metric] for run in runs]) for runs in sides), _ratios(pairs)]
    )


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread} ({len(values)})"


def _ratios(pairs: Sequence[tuple[Run, Run]]) -> str:
    """Ours over theirs, in tokens a processor second."""
    ratios = [mine["tokens"] / mine["cpu"] / (other["tokens"] / other["cpu"]) for mine, other in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
