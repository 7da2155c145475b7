"""What is drawn of a run and of an evaluation: learning curves, reliability, confusion. Needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bertology_serve.errors import Unsupported
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.metrics import BINS, Floats
from bertology_serve.training.evaluation import Evaluation
from bertology_serve.training.run_directory import LOG
from bertology_serve.training.trainer import Line

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
    from matplotlib.figure import Figure

    scores, true = certainty.T
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    used = counts > 0
    said, came = (np.bincount(place, side, BINS)[used] / counts[used] for side in (scores, true))
    figure = Figure(figsize=(4.0, 4.6), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), color="grey", linewidth=0.8, linestyle=":")
    above.plot(said, came, marker="o", color="tab:blue")
    above.set(ylabel="how often right", xlim=(0, 1), ylim=(0, 1))
    below.bar((np.arange(BINS) + 0.5) / BINS, counts, width=0.9 / BINS, color="tab:blue")
    below.set(xlabel="score", ylabel="answers")
    figure.savefig(path)
    return path


def _confusion(labels: list[str], table: list[list[int]], path: Path) -> Path:
    """Shares of each row, the gold label; counts are written in where there is room."""
    from matplotlib.figure import Figure

    counts = np.array(table)
    side = min(2.5 + 0.35 * len(labels), 20.0)
    figure = Figure(figsize=(side, side), dpi=DPI, layout="constrained")
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
    figure.savefig(path)
    return path
