"""The figures of an evaluation: ``reliability.png``, and ``confusion.png`` for classification. Need matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.metrics import BINS, Floats
from bertology_serve.training.evaluation import Evaluation

DPI = 120


def draw(found: Evaluation, folder: Path) -> list[Path]:
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
