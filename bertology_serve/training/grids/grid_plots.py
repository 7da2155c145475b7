"""A grid's plots. They need matplotlib (the extra ``plots``)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bertology_serve.training.grids.grid import GridMethod, combinations, row_name, slug
from bertology_serve.training.grids.grid_tables import Column, Results, parameters
from bertology_serve.training.method_options import Values

WIDTH, HEIGHT, DPI = 4.6, 3.4, 120
Logs = Mapping[tuple[str, str], Sequence[Path]]


def available() -> bool:
    """Whether anything can be drawn."""
    return find_spec("matplotlib") is not None


def draw_axes(results: Results, folder: Path) -> list[Path]:
    """``over-AXIS.png`` for every field that varies over numbers: the metric over it, one panel a column."""
    axes = sorted({axis for _, method in results.rows for axis in method.vary if _numeric(method.vary[axis])})
    paths, columns = [], results.filled()
    for axis in axes if columns else ():
        figure, panels = _panels(len(columns))
        for panel, column in zip(panels, columns, strict=True):
            for name, points in _lines(results, axis, column):
                places, middles, spreads = zip(*points, strict=True)
                panel.errorbar(places, middles, yerr=spreads, marker="o", capsize=3, label=name)
            panel.set(title=column.title, xlabel=axis.replace("_", " "), ylabel=f"{column.metric}, %")
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=7)
        paths.append(_saved(figure, folder / f"over-{slug(axis)}.png"))
    return paths


def draw_parameters(results: Results, folder: Path) -> Path:
    """``parameters.png``: the metric over the parameters trained, one panel a column, one point a row."""
    columns = results.filled()
    figure, panels = _panels(len(columns))
    for panel, column in zip(panels, columns, strict=True):
        for name, _ in results.rows:
            middle, count = results.cell(name, column).middle, parameters(results, name)
            if middle is not None and count is not None:
                panel.plot(max(count, 1), middle, marker="o")
                panel.annotate(name, (max(count, 1), middle), fontsize=6, xytext=(3, 2), textcoords="offset points")
        panel.set(title=column.title, xlabel="trained parameters, without the head", ylabel=f"{column.metric}, %")
        panel.set_xscale("log")
        panel.margins(x=0.2)
    return _saved(figure, folder / "parameters.png")


def draw_gradients(results: Results, logs: Logs, folder: Path) -> list[Path]:
    """``gradients-TASK.png``: each layer's gradient over the first steps of a row's last stage, mean over the seeds.

    ``logs`` are the runs' logs by (row, task); rows whose logs hold no ``layer_norms`` have no panel.
    """
    paths = []
    for task in results.grid.tasks:
        found = {name: layer_curves(logs.get((name, task.name), ())) for name, _ in results.rows}
        shown = {name: curves for name, curves in found.items() if curves}
        if not shown:
            continue
        figure, panels = _panels(len(shown), sharey=True)
        for panel, (name, curves) in zip(panels, shown.items(), strict=True):
            for place in sorted(curves, key=_order):
                panel.plot(range(1, len(curves[place]) + 1), curves[place], linewidth=0.9, label=place)
            panel.set(title=name, xlabel="step", ylabel="length of the gradient")
            panel.set_yscale("log")
            panel.legend(fontsize=6, ncols=2)
        paths.append(_saved(figure, folder / f"gradients-{slug(task.name)}.png"))
    return paths


def layer_curves(logs: Sequence[Path]) -> dict[str, list[float]]:
    """By place (layer, ``embeddings``, ``head``) the gradient's length at each step of the last stage, over seeds."""
    runs = [found for path in logs if (found := _norms(path))]
    steps = min(map(len, runs), default=0)
    places = runs[0][0] if runs else {}
    return {
        place: [statistics.fmean(run[step].get(place, 0.0) for run in runs) for step in range(steps)]
        for place in places
        if place != "delta"
    }


def _norms(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = max((line.get("stage", 0) for line in lines), default=0)
    return [line["layer_norms"] for line in lines if "layer_norms" in line and line.get("stage", 0) == last]


def _lines(results: Results, axis: str, column: Column) -> Iterator[tuple[str, list[tuple[float, float, float]]]]:
    """(name, points of axis value, middle and deviation) of every method that varies the axis, others held."""
    for method in results.grid.methods:
        if axis not in method.vary:
            continue
        others = {name: values for name, values in method.vary.items() if name != axis}
        for held in combinations(others):
            points = [
                point
                for value in method.vary[axis]
                if isinstance(value, int | float) and (point := _point(results, method, axis, value, held, column))
            ]
            if points:
                yield row_name(method.name, held), points


def _point(
    results: Results, method: GridMethod, axis: str, value: float, held: Values, column: Column
) -> tuple[float, float, float] | None:
    values = {name: value if name == axis else held[name] for name in method.vary}
    cell = results.cell(row_name(method.name, values), column)
    return None if cell.middle is None else (value, cell.middle, cell.spread or 0.0)


def _numeric(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _order(place: str) -> tuple[int, int]:
    """Embeddings, the layers from below, the rest, the head."""
    if place.isdecimal():
        return 1, int(place)
    return {"embeddings": 0, "rest": 2}.get(place, 3), 0


def _panels(count: int, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of at most three panels across; those left over are hidden."""
    from matplotlib.figure import Figure

    across = min(count, 3)
    down = -(-count // across)
    figure = Figure(figsize=(WIDTH * across, HEIGHT * down), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, **options).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path
