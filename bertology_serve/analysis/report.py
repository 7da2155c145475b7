"""What an analysis returns, and how it lies on disk: one JSON, a CSV a table, a PNG a figure, one HTML page."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import torch

from bertology_serve import __version__
from bertology_serve.analysis import figures as drawing
from bertology_serve.analysis.figures import BarChart, Figure, HeatMap, LineChart, Panel, Scatter
from bertology_serve.analysis.subject_model import Subject
from bertology_serve.encoder.encoder import weights_hash
from bertology_serve.errors import FormatError, NotFound, nearest
from bertology_serve.files import JsonObject, write_json


@dataclass(frozen=True)
class AnalysisReport:
    """What an analysis found: ``facts`` say what was analysed and how, ``tables`` are rows (cells by column) by name.

    ``figures`` hold all their numbers. Everything is plain JSON values; numbers are floats, shares are fractions.
    """

    name: str
    facts: JsonObject
    tables: Mapping[str, Sequence[JsonObject]]
    figures: Mapping[str, Figure]

    @property
    def table(self) -> Sequence[JsonObject]:
        """The rows of the main table."""
        return next(iter(self.tables.values()))

    def plot(self, path: str | Path, figure: str | None = None) -> Path:
        """Draws one figure, the first unless another is named, as the PNG ``path``, and returns that.

        Raises NotFound for a name that is not among ``figures``, Unsupported without matplotlib (extra ``plots``).
        """
        name = next(iter(self.figures)) if figure is None else figure
        if name not in self.figures:
            raise NotFound(f"the report has no figure {name[:80]!r}; {nearest(name, self.figures)}")
        drawing.draw(self.figures[name], Path(path))
        return Path(path)

    def as_dict(self) -> JsonObject:
        """Everything, ready for JSON; numbers that are not finite become null."""
        return {
            "analysis": self.name,
            "facts": _plain(self.facts),
            "tables": _plain(self.tables),
            "figures": {name: _plain(figure.as_dict()) for name, figure in self.figures.items()},
        }

    @classmethod
    def from_dict(cls, values: JsonObject) -> AnalysisReport:
        """The report whose JSON this is."""
        figures = {name: Figure.from_dict(figure) for name, figure in values["figures"].items()}
        return cls(values["analysis"], values["facts"], values["tables"], figures)

    @classmethod
    def load(cls, path: str | Path) -> AnalysisReport:
        """A report from its JSON: ``save`` writes every file of it again. Raises NotFound, FormatError."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise NotFound(f"no file {path}; give the JSON of a report") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path} is no report's JSON ({type(error).__name__}: {str(error)[:80]})") from None

    def save(self, directory: str | Path) -> list[Path]:
        """Writes NAME.json, NAME.html, NAME-TABLE.csv and, where matplotlib is installed, NAME-FIGURE.png."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        whole = self.as_dict()
        paths = [folder / f"{self.name}.json", folder / f"{self.name}.html"]
        write_json(paths[0], whole)
        paths[1].write_text(render(self.name, whole["facts"], self.figures), encoding="utf-8")
        for name, rows in self.tables.items():
            paths.append(folder / f"{self.name}-{name}.csv")
            _write_csv(paths[-1], rows)
        for name, figure in self.figures.items() if drawing.available() else ():
            paths.append(folder / f"{self.name}-{name}.png")
            drawing.draw(figure, paths[-1])
        return paths


def origin() -> dict[str, str]:
    """Versions and the date, for the facts."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"bertology_serve": __version__, "torch": torch.__version__, "date": now}


def _write_csv(path: Path, rows: Sequence[JsonObject]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


KEY = "content"  # the fact that holds the key


def content_key(name: str, subjects: Sequence[Subject], files: Sequence[str | Path | None], *settings: object) -> str:
    """SHA-256 (hex) of all that a report follows from: this version, weights, deltas, the files' bytes, settings.

    A name that is no file (``hub:...``, a word) counts as itself.
    """
    digest = hashlib.sha256(f"{__version__} {name}".encode())
    for subject in subjects:
        delta = subject.delta
        digest.update(subject.encoder.ref.sha256.encode())
        if delta is not None:
            digest.update(repr((delta.name, delta.version, delta.specs, delta.task)).encode())
            for tensors in (delta.tensors, delta.head):
                digest.update(weights_hash(tensors).encode())
    for file in files:
        path = None if file is None else Path(file)
        there = path is not None and path.is_file()
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path and there else repr(file).encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def remembered(
    folder: Path, name: str, key: str, make: Callable[[], AnalysisReport], again: bool = False
) -> tuple[AnalysisReport, bool]:
    """The report that lies in a folder if its key is this one, else (or ``again``) a new one; whether it lay there."""
    file = folder / f"{name}.json"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["facts"][KEY] == key and not again:
            return AnalysisReport.from_dict(held), True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no report, or none of ours: it is made
    report = make()
    return replace(report, facts={**report.facts, KEY: key}), False


# viridis and PuOr at ninths, and Okabe and Ito's colours
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
PURPLE_ORANGE = ("#7f3b08", "#c1690b", "#f6ac51", "#fddfb6", "#f7f7f7", "#d8daeb", "#b2abd2", "#7f70ab", "#2d004b")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:92rem;padding:0 1rem;color:#1a1a1a}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}figure{margin:.6rem 1.4rem .6rem 0}
.row{display:flex;flex-wrap:wrap}figcaption{font-weight:600;margin-bottom:.2rem}svg text{font:11px system-ui,sans-serif}
pre{background:#f5f5f5;padding:.7rem;overflow:auto;max-height:24rem}rect:hover,circle:hover{stroke:#000;stroke-width:2}
.key{font-size:12px;margin-right:.9rem;white-space:nowrap}.key i{display:inline-block;width:.8em;height:.8em;
margin-right:.3em}"""
WIDTH, HEIGHT, LEFT, BOTTOM = 580, 280, 72, 40
MANY = 60  # points of a curve, beyond which they are drawn small


def render(name: str, facts: JsonObject, figures: Mapping[str, Figure]) -> str:
    """The whole page."""
    sections = "\n".join(f"<h2>{escape(figure.title)}</h2>\n{_rows(figure)}" for figure in figures.values())
    shown = escape(json.dumps(facts, indent=1))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{escape(name)}</h1>\n{sections}\n"
        f"<h2>Facts</h2>\n<pre>{shown}</pre>\n</body></html>\n"
    )


def _rows(figure: Figure) -> str:
    """The panels in rows of ``columns``; what is too wide for the window goes on below."""
    panels, width = list(map(_panel, figure.panels)), figure.columns
    rows = ("\n".join(panels[at : at + width]) for at in range(0, len(panels), width))
    return "\n".join(f'<div class="row">{row}</div>' for row in rows)


def _panel(panel: Panel) -> str:
    body = {HeatMap: _heat_map, LineChart: _lines, Scatter: _scatter, BarChart: _bars}[type(panel)](panel)  # type: ignore[operator]
    return f"<figure><figcaption>{escape(panel.title)}</figcaption>{body}</figure>"


def _heat_map(panel: HeatMap) -> str:
    known = [v for row in panel.values for v in row if v is not None and math.isfinite(v)]
    low, high = panel.limits or (min(known, default=0.0), max(known, default=1.0))
    wide = max(map(len, panel.row_names), default=2) * 6.5 + 30
    tall = max(map(len, panel.column_names), default=1) * 6 + 34
    scale = PURPLE_ORANGE if panel.diverging else VIRIDIS
    side, rows, columns = 22, len(panel.values), len(panel.values[0])
    cells = []
    for i, row in enumerate(panel.values):
        cells.append(_text(wide - 6, i * side + 15, panel.row_names[i] if panel.row_names else str(i), "end"))
        for j, value in enumerate(row):
            where = f"{_named(panel.rows, panel.row_names, i)}, {_named(panel.columns, panel.column_names, j)}"
            tip = f"{where}: {_number(value)} ({panel.unit})"
            cells.append(f'<rect x="{wide + j * side:.0f}" y="{i * side}" width="{side - 1}" height="{side - 1}" '
                         f'fill="{_colour(value, low, high, scale)}"><title>{escape(tip)}</title></rect>')  # fmt: skip
    for j in range(columns):
        at, label = wide + j * side + side / 2, panel.column_names[j] if panel.column_names else str(j)
        cells.append(_text(at, rows * side + 13, label, "middle") if len(label) < 3 else
                     _text(at + 4, rows * side + 10, label, "end", -60))  # fmt: skip
    cells.append(_text(wide + columns * side / 2, rows * side + tall - 4, panel.columns, "middle"))
    cells.append(_text(11, max(rows * side / 2, 3.2 * len(panel.rows)), panel.rows, "middle", -90))
    key = f'<div class="key">{escape(panel.unit)}: {_number(low)} ' + "".join(
        f'<i style="background:{colour};margin:0"></i>' for colour in scale) + f" {_number(high)}</div>"  # fmt: skip
    return _svg(wide + max(columns * side, 8 * len(panel.columns)), rows * side + tall, cells) + key


def _lines(panel: LineChart) -> str:
    values = [v for curve in panel.curves.values() for v in curve if v is not None and math.isfinite(v)]
    edges = [
        value + way * width
        for name, band in panel.spread.items() for value, width in zip(panel.curves[name], band, strict=True)
        if value is not None and math.isfinite(value + width) for way in (-1, 1)
    ]  # fmt: skip
    frame = _Frame(panel.x, [*values, *edges, *([] if panel.level is None else [panel.level])])
    radius = 3.5 if len(panel.x) <= MANY else 1.5
    parts = list(frame.axes(panel.x_label, panel.y_label))
    for n, (name, curve) in enumerate(panel.curves.items()):
        points = [(x, v) for x, v in zip(panel.x, curve, strict=True) if v is not None and math.isfinite(v)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(v):.1f}" for x, v in points)
        colour = PALETTE[n % len(PALETTE)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if name in panel.spread and len(points) == len(panel.x):
            both = [(x, v, s) for (x, v), s in zip(points, panel.spread[name], strict=True)]
            around = [(x, v + s) for x, v, s in both] + [(x, v - s) for x, v, s in reversed(both)]
            band = " ".join(f"{frame.x(x):.1f},{frame.y(v):.1f}" for x, v in around)
            parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.15"/>')
        tips = [(x, v, f"{name}, {panel.x_label} {_number(x)}: {_number(v)}") for x, v in points]
        parts += [frame.point(x, v, colour, tip, radius) for x, v, tip in tips]
    if panel.level is not None:
        y = frame.y(panel.level)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#555" stroke-dasharray="2 3"/>')
    level = f'<span class="key">dotted: {escape(panel.level_name)}</span>' if panel.level_name else ""
    return _svg(WIDTH + 10, HEIGHT + BOTTOM + 10, parts) + _keys(panel.curves) + level


def _scatter(panel: Scatter) -> str:
    frame = _Frame(panel.x, panel.y)
    parts = list(frame.axes(panel.x_label, panel.y_label))
    for x, y, name, group in zip(panel.x, panel.y, panel.names, panel.groups, strict=True):
        tip = f"{name}: {panel.group_label} {group + 1}"
        parts.append(frame.point(x, y, PALETTE[group % len(PALETTE)], tip, 5))
    return _svg(WIDTH + 10, HEIGHT + BOTTOM + 10, parts) + _keys(
        [f"{panel.group_label} {group + 1}" for group in sorted(set(panel.groups))]
    )


def _bars(panel: BarChart) -> str:
    known = [v for own in panel.series.values() for v in own if v is not None and math.isfinite(v)]
    low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0) or 1.0
    wide, thick = max(map(len, panel.names), default=2) * 6 + 20, 9
    step = thick * len(panel.series) + 8
    tall, right = step * len(panel.names), wide + 330
    at = {value: wide + (right - wide) * (value - low) / (high - low) for value in [0.0, *known, *_ticks(low, high)]}
    parts = [_text(at[tick], tall + 14, _number(tick), "middle") for tick in _ticks(low, high)]
    parts += [f'<path d="M{at[tick]:.1f},0V{tall}" stroke="#ddd"/>' for tick in _ticks(low, high)]
    for i, name in enumerate(panel.names):
        parts.append(_text(wide - 6, i * step + step / 2 + 2, name, "end"))
        for n, (series, values) in enumerate(panel.series.items()):
            value = values[i]
            if value is not None and math.isfinite(value):
                start, end = sorted((at[0.0], at[value]))
                tip = escape(f"{name}, {series}: {_number(value)} ({panel.unit})")
                colour, y = PALETTE[n % len(PALETTE)], i * step + n * thick + 2
                parts.append(f'<rect x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{thick - 1}" '
                             f'fill="{colour}"><title>{tip}</title></rect>')  # fmt: skip
    parts.append(_text((wide + right) / 2, tall + 32, panel.unit, "middle"))
    return _svg(right + 24, tall + 40, parts) + _keys(panel.series)


class _Frame:
    """Data coordinates to those of the picture."""

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        self.low_x, self.high_x = min(x, default=0.0), max(x, default=1.0)
        low, high = min(y, default=0.0), max(y, default=1.0)
        margin = 0.06 * (high - low) or 0.5
        self.low_y, self.high_y = low - margin, high + margin

    def x(self, value: float) -> float:
        return LEFT + 10 + (WIDTH - LEFT - 20) * (value - self.low_x) / ((self.high_x - self.low_x) or 1.0)

    def y(self, value: float) -> float:
        return 6 + (HEIGHT - 6) * (self.high_y - value) / (self.high_y - self.low_y)

    def point(self, x: float, y: float, colour: str, tip: str, radius: float = 3.5) -> str:
        return (f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}" fill="{colour}">'
                f"<title>{escape(tip)}</title></circle>")  # fmt: skip

    def axes(self, x_label: str, y_label: str) -> Iterator[str]:
        yield f'<path d="M{LEFT},6V{HEIGHT}H{WIDTH}" fill="none" stroke="#888"/>'
        for y in _ticks(self.low_y, self.high_y):
            yield _text(LEFT - 5, self.y(y) + 4, _number(y), "end")
        for x in _ticks(self.low_x, self.high_x):
            yield _text(self.x(x), HEIGHT + 15, _number(x), "middle")
        yield _text((LEFT + WIDTH) / 2, HEIGHT + 34, x_label, "middle")
        yield _text(11, HEIGHT / 2, y_label, "middle", -90)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two ends, at most eleven."""
    size = high - low
    if size <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(size / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if size / (power * factor) <= 10)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _keys(names: Iterable[str]) -> str:
    spans = (
        f'<span class="key"><i style="background:{PALETTE[n % len(PALETTE)]}"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<div style="max-width:{WIDTH}px">{" ".join(spans)}</div>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg width="{width:.0f}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, turn: int = 0) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _named(axis: str, names: Sequence[str], index: int) -> str:
    return names[index] if names else f"{axis} {index}"


def _number(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _colour(value: float | None, low: float, high: float, scale: Sequence[str] = VIRIDIS) -> str:
    if value is None or not math.isfinite(value):
        return "#dddddd"
    at = min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0) * (len(scale) - 1)
    first = min(int(at), len(scale) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in scale[first : first + 2]]
    mixed = [round(a + (b - a) * (at - first)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
