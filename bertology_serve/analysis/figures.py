"""Figures as data: what the JSON holds, and what the PNG and the HTML are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
class Lines:
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
class Bars:
    """For every name a bar a series, lying; ``unit`` is that of all of them."""

    title: str
    names: Sequence[str]
    series: Mapping[str, Numbers]
    unit: str


Panel = HeatMap | Lines | Scatter | Bars


@dataclass(frozen=True)
class Figure:
    """One picture: panels in rows of ``columns``."""

    title: str
    panels: Sequence[Panel]
    columns: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; each panel says its kind."""
        panels = [{"kind": type(panel).__name__, **asdict(panel)} for panel in self.panels]
        return {"title": self.title, "columns": self.columns, "panels": panels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Figure:
        """The figure that ``as_dict`` gave, so that it can be drawn again."""
        panels = [
            _KINDS[panel["kind"]](**{k: v for k, v in panel.items() if k != "kind"}) for panel in values["panels"]
        ]
        return cls(values["title"], panels, values["columns"])


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (HeatMap, Lines, Scatter, Bars)}
