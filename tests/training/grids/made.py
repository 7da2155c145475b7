"""Small grids and made-up results, for the tests of what is drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bertology_serve.training.grids.grid import Grid, GridMethod, GridTask
from bertology_serve.training.grids.grid_tables import Results

RANKS = (1, 4)


def grid(**values: Any) -> Grid:
    """Two tasks, one with another domain; full fine-tuning, and LoRA over ranks; two seeds."""
    tasks = (
        GridTask("Mood", "classification", "train.jsonl", "dev.jsonl", "accuracy", ood={"far": "far.jsonl"}),
        GridTask("Likeness", "regression", "pairs.jsonl", "pairs.jsonl", "spearman"),
    )
    methods = (
        GridMethod(
            "FT", {"method": "full"}, published={"Mood": 90.2, "Mood → far": 70.0, "Likeness": 80.0}, label="125.0M"
        ),
        GridMethod("LoRA", {"method": "lora"}, vary={"rank": RANKS}, published={"Mood": 91.0}),
    )
    return Grid(
        **{"title": "A grid", "backbone": "tiny", "tasks": tasks, "methods": methods, "seeds": (0, 1), **values}
    )


def result(own: float, far: float | None = None, metric: str = "accuracy", **facts: Any) -> dict[str, Any]:
    """What a run would have left."""
    measured = {"": {metric: own}} | ({} if far is None else {"far": {metric: far}})
    costs = {"seconds": 10.0, "tokens_per_second": 1000.0, "peak_bytes": 3 * 1024 * 1024, "optimizer_bytes": 1024}
    about = {"hardware": "CPU", "versions": "torch", "date": "2026-01-01", "rows": 12}
    counts = {"trained_parameters": 110, "delta_parameters": 100, "measured_rows": dict.fromkeys(measured, 7)}
    return {"measured": measured, **counts, **costs, **about, **facts}


def results(made: Grid, values: Mapping[str, Mapping[str, Any]]) -> Results:
    """Results by the runs' keys."""
    return Results(made, [(run, values[run.key]) for run in made.runs() if run.key in values])
