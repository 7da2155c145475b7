"""Draws the pictures of the README and docs that no measurement draws: ``python tools/pictures.py``.

Letters are drawn as paths, and ids are salted by a constant, so that the same program gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

matplotlib.rcParams["svg.hashsalt"] = "bertology-serve"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
# text, tokens, delta, kind, colour (told apart by the colour-blind), answer
ROWS = (
    ("never again", 4, "sentiment", "LoRA", "#0072B2", "negative 0.98"),
    ("a joy", 4, "sentiment", "LoRA", "#0072B2", "positive 0.99"),
    ("cancel my card", 5, "intent", "BitFit", "#E69F00", "card_cancel 0.97"),
    ("Ada lived in London", 6, "entities", "adapter", "#009E73", "Ada: PER, London: LOC"),
    ("a vector, please", 5, "base", "no delta", "#999999", "[0.02, -0.11, ...]"),
)


def packed_batch(path: Path) -> None:
    """Texts of four deltas as rows of one batch, through one frozen encoder, to each delta's own head."""
    canvas = Figure(figsize=(9.6, 3.9), layout="none")
    panel: Axes = canvas.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, 96), ylim=(0, 39))
    panel.axis("off")
    for x, title in ((1, "requests"), (30, "one packed batch"), (46, "one frozen encoder"), (71, "heads and answers")):
        panel.text(x, 36.6, title, fontsize=10, weight="bold", va="center")
    top, unit = 33.5, 1.24
    y = top
    _box(panel, 46, top - 24 * unit, 19, 24 * unit, "#f2f2f2")
    panel.text(55.5, top - 2.1, "x W + b", ha="center", fontsize=12, family="monospace")
    panel.text(55.5, top - 4.6, "every row, once", ha="center", fontsize=9, color="#444444")
    shown: set[str] = set()
    for text, tokens, delta, kind, colour, answer in ROWS:
        height = tokens * unit
        middle = y - height / 2
        panel.text(1, middle + 0.75, f"“{text}”", fontsize=10, va="center")
        panel.text(1, middle - 0.95, f"{delta} ({kind})", fontsize=9, va="center", color=colour)
        _arrow(panel, 22.5, middle, 29.3)
        for row in range(tokens):
            panel.add_patch(
                Rectangle((30, y - (row + 1) * unit), 10, unit, facecolor=colour, edgecolor="white", lw=1.2)
            )
        _arrow(panel, 41, middle, 45.5)
        if kind != "no delta" and delta not in shown:
            change = {"LoRA": "+ x A B", "BitFit": "+ d", "adapter": "+ up(act(down x))"}[kind]
            at = middle if tokens > 4 else y - height
            panel.text(55.5, min(at, top - 8.2), change, ha="center", va="center", fontsize=10, color=colour,
                       family="monospace")  # fmt: skip
        shown.add(delta)
        _arrow(panel, 65.5, middle, 70)
        panel.text(71, middle, answer, fontsize=10, va="center", color=colour)
        y -= height
    panel.text(46, 1.6, "no padding; each answer is the one that the text would get alone", fontsize=9, color="#444444")
    _save(canvas, path)
    canvas.savefig(path.with_suffix(".png"), dpi=110)


FLOWS = {
    "choose-a-method": (
        (
            ("No examples with labels?", "--task zero-shot: labels come with the call"),
            ("Is the probe good enough?", "--recipe lp: a head of some kilobytes"),
            ("One task alone, and each point counts?", "--method full, then compress"),
            ("Minutes to spare for a search?", "--method auto"),
            ("Is one text asked many things?", "LoRA with --layers top:2: deltas share the rest"),
        ),
        "LoRA, the default; adapters where it falls short",
    ),
    "choose-an-engine": (
        (
            ("A GPU, or a family without its own graph?", "--engine torch"),
            ("One task alone, and no server wanted?", "export --merge: a file for any runtime"),
            ("Is half the time worth 0.3 points?", "--engine onnx --precision int8-row"),
            ("Must it start at once?", "--engine torch: no graph is built"),
        ),
        "--engine auto, the default: the faster one here",
    ),
    "choose-a-precision": (
        (
            ("On a GPU?", "--target cuda --precision fp16"),
            ("Is fp32 fast and small enough?", "fp32: torch's answers"),
            ("Is it the file's size alone?", "int8-nbits: nearest in 8 bits, no faster"),
            ("Mixed lengths, or several deltas?", "int8-row: neighbours change nothing but rounding"),
            ("Full or long batches of one task?", "--target openvino --precision int8-static"),
        ),
        "int8-row",
    ),
}
"""Questions with what to take where the answer is yes, and what is left."""


def flow(path: Path, questions: tuple[tuple[str, str], ...], last: str) -> None:
    """Questions below one another; each leads right where the answer is yes, and else down."""
    step, width = 7.0, 42
    height = step * (len(questions) + 1)
    canvas = Figure(figsize=(9.6, height / 10), layout="none")
    panel: Axes = canvas.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, 96), ylim=(0, height))
    panel.axis("off")
    for place, (question, answer) in enumerate(questions):
        y = height - step * (place + 0.5)
        _box(panel, 1.5, y - 2, width - 4, 4, "#f2f2f2")
        panel.text(width / 2 - 0.5, y, question, ha="center", va="center", fontsize=10)
        _arrow(panel, width - 2, y, width + 5)
        panel.text(width + 1.3, y + 0.7, "yes", ha="center", fontsize=9, color="#444444")
        _result(panel, width + 5.5, y, answer)
        panel.add_patch(FancyArrowPatch((8, y - 2.2), (8, y - step + 2.2), **ARROW))
        panel.text(9, y - step / 2, "no", va="center", fontsize=9, color="#444444")
    _result(panel, 1.5, step * 0.5, last)
    _save(canvas, path)


def _result(panel: Axes, x: float, y: float, text: str) -> None:
    _box(panel, x, y - 2, 47, 4, "#dbe9f5")
    panel.text(x + 23.5, y, text, ha="center", va="center", fontsize=10)


PLACES = ("input", "query", "key", "value", "output", "norm", "FFN up", "FFN down", "norm", "head")
KINDS = {
    "probe": {9: "new"},
    "BitFit": {**dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8), "+ b"), 0: "+ b", 9: "new"},
    "LoRA, VeRA": {1: "+ x A B", 3: "+ x A B", 9: "new"},
    "adapter": {4: "+ U f(D h)", 7: "+ U f(D h)", 9: "new"},
    "IA³": {2: "× l", 3: "× l", 6: "× l", 9: "new"},
    "LayerNorm": {5: "w, b", 8: "w, b", 9: "new"},
    "prompt": {0: "+ rows", 9: "new"},
    "prefix": {2: "+ keys", 3: "+ values", 9: "new"},
    "full": {**dict.fromkeys(range(9), "W + Δ"), 9: "new"},
}
"""What each kind changes at which place of a layer."""
COLOURS = ("#999999", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A000", "#666666")


def kinds(path: Path) -> None:
    """One layer's places as columns, the kinds as rows, and what each adds where."""
    left, wide, high = 13.0, 8.2, 3.4
    top = high * (len(KINDS) + 1.4)
    canvas = Figure(figsize=(9.6, top / 10), layout="none")
    panel: Axes = canvas.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, 96), ylim=(0, top))
    panel.axis("off")
    for column, place in enumerate(PLACES):
        panel.text(left + wide * (column + 0.5), top - high * 0.8, place, ha="center", va="center", fontsize=9,
                   weight="bold")  # fmt: skip
    for row, ((kind, changes), colour) in enumerate(zip(KINDS.items(), COLOURS, strict=True)):
        y = top - high * (row + 2.2)
        panel.text(1, y + high / 2, kind, va="center", fontsize=10, color=colour, weight="bold")
        for column in range(len(PLACES)):
            box = left + wide * column + 0.3
            text = changes.get(column)
            shade = {"facecolor": colour, "alpha": 0.25} if text else {"facecolor": "#f5f5f5"}
            panel.add_patch(Rectangle((box, y + 0.3), wide - 0.6, high - 0.6, edgecolor="none", **shade))
            if text:
                panel.text(box + wide / 2 - 0.3, y + high / 2, text, ha="center", va="center", fontsize=8)
    _save(canvas, path)


def _save(canvas: Figure, path: Path) -> None:
    canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


ARROW: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "#888888", "lw": 1}


def _box(panel: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.8"
    panel.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="#888888"))


def _arrow(panel: Axes, x: float, y: float, to: float) -> None:
    panel.add_patch(FancyArrowPatch((x, y), (to, y), **ARROW))


if __name__ == "__main__":
    packed_batch(IMAGES / "packed-batch")
    kinds(IMAGES / "kinds")
    for name, (questions, last) in FLOWS.items():
        flow(IMAGES / name, questions, last)
