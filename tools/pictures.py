"""Draws the pictures of the README and docs that no measurement draws: ``python tools/pictures.py``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

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
        panel.text(x, 36.6, title, fontsize=11, weight="bold", va="center")
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
    canvas.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    canvas.savefig(path.with_suffix(".png"), dpi=110)


def _box(panel: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.8"
    panel.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="#888888"))


def _arrow(panel: Axes, x: float, y: float, to: float) -> None:
    panel.add_patch(FancyArrowPatch((x, y), (to, y), arrowstyle="-|>", mutation_scale=9, color="#888888", lw=1))


if __name__ == "__main__":
    packed_batch(IMAGES / "packed-batch")
