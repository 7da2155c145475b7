"""``bertology-serve reproduce``: a grid of training runs, and its table beside the published figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import load_library, note, progress, table
from bertology_serve.cli.options import listed
from bertology_serve.errors import SpecError

if TYPE_CHECKING:
    from bertology_serve.training.grids.grid import Grid, GridRun
    from bertology_serve.training.grids.grid_run import GridPlace


def reproduce(
    grid: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a grid that --list shows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the runs, the table and the plots.")] = None,
    data: Annotated[Path, typer.Option(help="Folder below which the grid's files lie.")] = Path("."),
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, with commas.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, with commas.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the deltas too, not their figures alone.")] = False,
    table_only: Annotated[
        bool, typer.Option("--table", help="Write table and plots of what is there; run nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and stop.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the grids that come with the package.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
) -> None:
    """Run a grid of methods, tasks and seeds; what is finished is kept, and the same command continues."""
    from bertology_serve.training.grids.grid import find_grid

    if show:
        return show_presets()
    if grid is None:
        raise SpecError("no grid was given; name a TOML file, or one of those that reproduce --list shows")
    chosen = find_grid(grid).only(listed(tasks) or (), listed(methods) or ())
    runs = list(chosen.runs())
    if dry_run:
        rows = [
            [run.key, ",".join(run.config.method), run.config.plan.recipe or "", run.config.optim.epochs]
            for run in runs
        ]
        return table(f"{len(runs)} runs: {chosen.title}", ["run", "method", "recipe", "epochs"], rows, stderr=False)
    if out is None:
        raise SpecError("no --out was given; say where runs and table shall lie, or count the runs with --dry-run")
    load_library(device=device)

    from bertology_serve.encoder.loading import find_device
    from bertology_serve.training.grids.grid_run import LONG, TABLE, WIDE, GridPlace, write_report
    from bertology_serve.training.grids.grid_tables import figures
    from bertology_serve.training.processes import check_alone

    check_alone("reproduce")
    place = GridPlace(out, data, chosen.backbone, find_device(device), keep)
    failed = [] if table_only else make(runs, chosen, place)
    results = write_report(chosen, place)
    print(figures(results))
    note(f"{place.out / TABLE}, {WIDE}, {LONG} and the plots beside it are of {len(results.found)} of {len(runs)} runs")
    if failed:
        raise SpecError(f"{len(failed)} of {len(runs)} runs failed and are not in the table: {', '.join(failed)}")


def show_presets() -> None:
    """The packaged grids, and what each is."""
    from bertology_serve.training.grids.grid import presets, read_grid

    grids = {name: read_grid(path) for name, path in presets().items()}
    rows = [[name, one.title, one.backbone, len(list(one.runs()))] for name, one in grids.items()]
    table("grids that come with the package", ["name", "title", "backbone", "runs"], rows, stderr=False)


def make(runs: list[GridRun], grid: Grid, place: GridPlace) -> list[str]:
    """Makes what is missing, the table anew after each run; returns the keys of runs that failed."""
    from bertology_serve.training.grids.grid_run import execute, result_of, write_report

    missing = [run for run in runs if result_of(run, place) is None]
    note(f"{len(runs) - len(missing)} of {len(runs)} runs are there")
    failed: list[str] = []
    with progress() as bar:
        task = bar.add_task("reproduce", total=len(runs), completed=len(runs) - len(missing))
        for run in missing:
            try:
                found = execute(run, place)
            except SpecError as problem:  # a loss that exploded; the others go on
                failed.append(run.key)
                note(f"{run.key}: {problem}")
            else:
                values = {name or run.task.name: one[run.task.metric] for name, one in found["measured"].items()}
                shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())
                note(f"{run.key}: {shown} ({run.task.metric}), {found['seconds']:.0f} s")
            bar.advance(task)
            write_report(grid, place, draw=False)
    return failed
