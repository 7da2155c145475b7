"""The learning curve of a run, drawn from its log. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from bertology_serve.errors import Unsupported
from bertology_serve.training.callbacks import Line
from bertology_serve.training.run_directory import LOG

CURVE = "curve.png"
WIDTH, HEIGHT, DPI = 7.0, 3.2, 120


def check_plots() -> None:
    """Raises Unsupported where nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise Unsupported("--plot needs matplotlib, which is not installed; take the extra bertology-serve[plots]")


def draw_curve(directory: Path, metric: str) -> Path:
    """Draws ``curve.png`` beside the log of a published delta: loss, and ``metric`` where it was evaluated.

    The stages of a recipe stand one after the other, a line between them.
    """
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]
    places, borders = _places(lines)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    left = figure.subplots()
    left.set(xlabel="step", ylabel="training loss")
    left.plot(*_points(lines, places, lambda line: line.get("loss")), color="tab:blue", linewidth=1)
    right = left.twinx()
    right.set_ylabel(metric)
    right.plot(*_points(lines, places, lambda line: line.get("eval", {}).get(metric)), color="tab:orange", marker="o")
    for border in borders:
        left.axvline(border, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(directory / CURVE)
    return directory / CURVE


def draw_curves(path: Path, metric: str, curves: Mapping[str, Mapping[int, float]], start: float | None) -> None:
    """Draws the metric of several runs by their steps; ``start`` is what all begin with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
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
