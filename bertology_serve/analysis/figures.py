"""Figures as data, which is what the JSON holds, and as PNG by matplotlib (the extra ``plots``)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bertology_serve.errors import Unsupported
from bertology_serve.files import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Numbers = Sequence[float | None]


@dataclass(frozen=True)
class HeatMap:
    """``values[row][column]``; ``unit`` names what a colour means, ``limits`` the ends of its scale.

    ``diverging`` scales have white in their middle, for values of either sign.
    """

    title: str
    values: Sequence[Numbers]
    rows: str
    columns: str
    unit: str
    limits: tuple[float, float] | None = None
    row_names: Sequence[str] = ()
    column_names: Sequence[str] = ()
    diverging: bool = False


@dataclass(frozen=True)
class LineChart:
    """One curve a name over common ``x``; ``spread`` is what a curve's band reaches up and down (same unit)."""

    title: str
    x: Sequence[float]
    curves: Mapping[str, Numbers]
    x_label: str
    y_label: str
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)
    level: float | None = None
    level_name: str = ""


@dataclass(frozen=True)
class Scatter:
    """Points with a name each, in numbered groups."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    names: Sequence[str]
    groups: Sequence[int]
    x_label: str
    y_label: str
    group_label: str = "cluster"


@dataclass(frozen=True)
class BarChart:
    """For every name a bar a series, lying; ``unit`` is that of all of them."""

    title: str
    names: Sequence[str]
    series: Mapping[str, Numbers]
    unit: str


Panel = HeatMap | LineChart | Scatter | BarChart


@dataclass(frozen=True)
class Figure:
    """One picture: panels in rows of ``columns``."""

    title: str
    panels: Sequence[Panel]
    columns: int = 1

    def as_dict(self) -> JsonObject:
        """Ready for JSON; each panel says its kind."""
        panels = [{"kind": _NAMES[type(panel)], **asdict(panel)} for panel in self.panels]
        return {"title": self.title, "columns": self.columns, "panels": panels}

    @classmethod
    def from_dict(cls, values: JsonObject) -> Figure:
        """The figure that ``as_dict`` gave, so that it can be drawn again."""
        panels = [
            _KINDS[panel["kind"]](**{k: v for k, v in panel.items() if k != "kind"}) for panel in values["panels"]
        ]
        return cls(values["title"], panels, values["columns"])


_KINDS: Mapping[str, type[Panel]] = {"HeatMap": HeatMap, "Lines": LineChart, "Scatter": Scatter, "Bars": BarChart}
_NAMES = {kind: name for name, kind in _KINDS.items()}


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
MOST_TICKS = 16


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, 150 dots an inch. Raises Unsupported without matplotlib."""
    if not available():
        raise Unsupported("figures need matplotlib, which is not installed; pip install 'bertology-serve[plots]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = min(figure.columns, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    width, height = _size(figure.panels[0])
    canvas = Canvas(figsize=(width * columns, height * rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, figure.panels, strict=False):
        _draw_panel(canvas, axis, panel)
    for axis in axes[len(figure.panels) :]:
        axis.set_visible(False)
    canvas.suptitle(figure.title, fontsize=12)
    canvas.savefig(path)


def _size(panel: Panel) -> tuple[float, float]:
    """Inches of one panel."""
    if isinstance(panel, HeatMap):
        columns, rows = len(panel.values[0]), len(panel.values)
        names = max(map(len, panel.row_names), default=0)
        return min(max(3.6, 0.28 * columns + 1.6 + 0.07 * names), 16), min(max(2.6, 0.26 * rows + 1.2), 14)
    if isinstance(panel, BarChart):
        return 8.4, 1.2 + len(panel.names) * (0.13 * len(panel.series) + 0.1)
    return (6.4, 5.4) if isinstance(panel, Scatter) else (7.6, 4.4)


def _draw_panel(canvas: Canvas, axis: Axes, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=10)
    if isinstance(panel, HeatMap):
        _heat_map(canvas, axis, panel)
    elif isinstance(panel, LineChart):
        _lines(axis, panel)
    elif isinstance(panel, BarChart):
        _bars(axis, panel)
    else:
        _scatter(axis, panel)


def _heat_map(canvas: Canvas, axis: Axes, panel: HeatMap) -> None:
    values = np.array([[math.nan if v is None else v for v in row] for row in panel.values], dtype=float)
    low, high = panel.limits or (None, None)
    image = axis.imshow(
        values,
        aspect="auto",
        cmap="PuOr" if panel.diverging else "viridis",
        vmin=low,
        vmax=high,
        interpolation="nearest",
    )
    axis.set_facecolor("#dddddd")  # where there is no value, as on the page
    axis.set_xlabel(panel.columns)
    axis.set_ylabel(panel.rows)
    _ticks(axis.set_xticks, values.shape[1], panel.column_names, rotation=45 if panel.column_names else 0)
    _ticks(axis.set_yticks, values.shape[0], panel.row_names)
    canvas.colorbar(image, ax=axis, label=panel.unit, fraction=0.06, pad=0.02)


def _ticks(place: Callable[..., object], count: int, names: Sequence[str], rotation: float = 0) -> None:
    step = 1 if names else max(1, math.ceil(count / MOST_TICKS))
    at = list(range(0, count, step))
    labels = [names[i] for i in at] if names else [str(i) for i in at]
    extra = {"rotation": rotation, "ha": "right"} if rotation else {}
    place(at, labels=labels, fontsize=8, **extra)


def _lines(axis: Axes, panel: LineChart) -> None:
    styles = zip(cycle(PALETTE), cycle(MARKERS), cycle(DASHES), strict=False)
    x = np.array(panel.x, dtype=float)
    for (name, values), (color, marker, dash) in zip(panel.curves.items(), styles, strict=False):
        y = np.array([math.nan if v is None else v for v in values], dtype=float)
        axis.plot(x, y, color=color, marker=marker, linestyle=dash, markersize=4, linewidth=1.5, label=name,
                  markevery=max(1, len(x) // MOST_TICKS))  # fmt: skip
        if name in panel.spread:
            band = np.array(panel.spread[name], dtype=float)
            axis.fill_between(x, y - band, y + band, color=color, alpha=0.18, linewidth=0)
    if panel.level is not None:
        axis.axhline(panel.level, color="#555555", linewidth=1, linestyle=":", label=panel.level_name or None)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    axis.grid(alpha=0.3)
    if len(panel.curves) > 1 or panel.level_name:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _scatter(axis: Axes, panel: Scatter) -> None:
    for group in sorted(set(panel.groups)):
        members = [i for i, other in enumerate(panel.groups) if other == group]
        axis.scatter(
            [panel.x[i] for i in members], [panel.y[i] for i in members], s=28, alpha=0.85,
            color=PALETTE[group % len(PALETTE)], marker=MARKERS[group % len(MARKERS)],
            label=f"{panel.group_label} {group + 1} ({len(members)})",
        )  # fmt: skip
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    axis.set_aspect("equal", adjustable="datalim")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _bars(axis: Axes, panel: BarChart) -> None:
    thick = 0.8 / len(panel.series)
    for n, (series, values) in enumerate(panel.series.items()):
        at = [i - 0.4 + (n + 0.5) * thick for i in range(len(panel.names))]
        lengths = [math.nan if value is None else value for value in values]
        axis.barh(at, lengths, height=0.9 * thick, color=PALETTE[n % len(PALETTE)], label=series)
    axis.set_yticks(range(len(panel.names)), labels=panel.names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(panel.unit)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.05), ncols=3, frameon=False)
