"""Writes what a grid's finished runs say: ``table.md``, ``table.csv``, ``runs.csv`` and the plots."""

from __future__ import annotations

from pathlib import Path

from bertology_serve.files import replacing
from bertology_serve.training.grids import grid_plots
from bertology_serve.training.grids.grid import Grid
from bertology_serve.training.grids.grid_run import GridPlace, result_of
from bertology_serve.training.grids.grid_tables import Results, long_csv, markdown, wide_csv
from bertology_serve.training.run_directory import LOG

TABLE, WIDE, LONG = "table.md", "table.csv", "runs.csv"


def collect(grid: Grid, place: GridPlace) -> Results:
    """The finished runs of a grid."""
    return Results(grid, [(run, found) for run in grid.runs() if (found := result_of(run, place)) is not None])


def write_report(grid: Grid, place: GridPlace, draw: bool = True) -> Results:
    """Writes the tables and, with ``draw`` and where matplotlib is, the plots, of whatever is finished."""
    results = collect(grid, place)
    place.out.mkdir(parents=True, exist_ok=True)
    for name, text in ((TABLE, markdown(results)), (WIDE, wide_csv(results)), (LONG, long_csv(results))):
        with replacing(place.out / name) as own:
            own.write_text(text, encoding="utf-8")
    if draw and results.found and grid_plots.available():
        logs: dict[tuple[str, str], list[Path]] = {}
        for run, _ in results.found:
            logs.setdefault((run.row, run.task.name), []).append(place.directory(run) / LOG)
        grid_plots.draw_axes(results, place.out)
        grid_plots.draw_parameters(results, place.out)
        grid_plots.draw_gradients(results, logs, place.out)
    return results
