"""What is drawn of a run, an evaluation and a grid: learning curves, reliability, confusion. Needs matplotlib."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bertology_serve.errors import Unsupported
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.metrics import BINS, Floats
from bertology_serve.training.evaluation import Evaluation
from bertology_serve.training.grids.grid import GridMethod, combinations, row_name, slug
from bertology_serve.training.grids.grid_tables import Column, Results, parameters
from bertology_serve.training.method_options import Values
from bertology_serve.training.run_directory import LOG
from bertology_serve.training.trainer import Line

CURVE = "curve.png"
WIDTH, HEIGHT, DPI = 7.0, 3.2, 120
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.4


def can_plot() -> bool:
    """Whether anything can be drawn."""
    return find_spec("matplotlib") is not None


def check_plots() -> None:
    """Raises Unsupported where nothing can be drawn."""
    if not can_plot():
        raise Unsupported("--plot needs matplotlib, which is not installed; take the extra bertology-serve[plots]")


def draw_curve(directory: Path, metric: str) -> Path:
    """Draws ``curve.png`` beside the log of a published delta: loss, and ``metric`` where it was evaluated.

    The stages of a recipe stand one after the other, a line between them.
    """
    lines = [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]
    places, borders = _places(lines)
    figure = _figure(WIDTH, HEIGHT)
    left = figure.subplots()
    left.set(xlabel="step", ylabel="training loss")
    left.plot(*_points(lines, places, lambda line: line.get("loss")), color="tab:blue", linewidth=1)
    right = left.twinx()
    right.set_ylabel(metric)
    right.plot(*_points(lines, places, lambda line: line.get("eval", {}).get(metric)), color="tab:orange", marker="o")
    for border in borders:
        left.axvline(border, color="grey", linewidth=0.8, linestyle=":")
    return _saved(figure, directory / CURVE)


def draw_curves(path: Path, metric: str, curves: Mapping[str, Mapping[int, float]], start: float | None) -> None:
    """Draws the metric of several runs by their steps; ``start`` is what all begin with."""
    figure = _figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=metric)
    for name, curve in curves.items():
        points = {**({} if start is None else {0: start}), **curve}
        axes.plot(list(points), list(points.values()), marker="o", markersize=3, linewidth=1, label=name)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _places(lines: Iterable[Line]) -> tuple[list[int], list[int]]:
    """Each line's step, counted on over the stages, and where a new stage begins."""
    places: list[int] = []
    borders: list[int] = []
    stage, before = None, 0
    for line in lines:
        if stage is not None and line.get("stage") != stage:
            before = places[-1]
            borders.append(before)
        stage = line.get("stage")
        places.append(before + line["step"])
    return places, borders


def _points(
    lines: Iterable[Line], places: list[int], value: Callable[[Line], float | None]
) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have one."""
    pairs = zip(places, map(value, lines), strict=True)
    found = [(place, number) for place, number in pairs if number is not None]
    return [place for place, _ in found], [number for _, number in found]


def draw_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Draws what the task has into a folder; the paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if isinstance(found.task, LabelTask):
        paths.append(_reliability(found.certainty, folder / "reliability.png"))
    if found.confusion is not None:
        paths.append(_confusion(*found.confusion, folder / "confusion.png"))
    return paths


def _reliability(certainty: Floats, path: Path) -> Path:
    """How often scores came true, by bin, beside what they said, and how many there were of each."""
    scores, true = certainty.T
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    used = counts > 0
    said, came = (np.bincount(place, side, BINS)[used] / counts[used] for side in (scores, true))
    figure = _figure(4.0, 4.6)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), color="grey", linewidth=0.8, linestyle=":")
    above.plot(said, came, marker="o", color="tab:blue")
    above.set(ylabel="how often right", xlim=(0, 1), ylim=(0, 1))
    below.bar((np.arange(BINS) + 0.5) / BINS, counts, width=0.9 / BINS, color="tab:blue")
    below.set(xlabel="score", ylabel="answers")
    return _saved(figure, path)


def _confusion(labels: list[str], table: list[list[int]], path: Path) -> Path:
    """Shares of each row, the gold label; counts are written in where there is room."""
    counts = np.array(table)
    side = min(2.5 + 0.35 * len(labels), 20.0)
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    shown = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
    axes.set(xlabel="answered", ylabel="right", xticks=range(len(labels)), yticks=range(len(labels)))
    axes.set_xticklabels(shown, rotation=90)
    axes.set_yticklabels(shown)
    if len(labels) <= 24:
        for (down, across), count in np.ndenumerate(counts):
            if count:
                share = count / counts[down].sum()
                axes.text(across, down, str(count), ha="center", va="center", color="white" if share > 0.6 else "black")
    return _saved(figure, path)


Logs = Mapping[tuple[str, str], Sequence[Path]]


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
    across = min(count, 3)
    down = -(-count // across)
    figure = _figure(PANEL_WIDTH * across, PANEL_HEIGHT * down)
    panels = list(figure.subplots(down, across, squeeze=False, **options).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path
