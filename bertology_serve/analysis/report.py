"""What an analysis returns, and how it lies on disk: one JSON, a CSV a table, a PNG a figure, one HTML page."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bertology_serve import __version__
from bertology_serve.analysis import page, plots
from bertology_serve.analysis.figures import Figure
from bertology_serve.errors import FormatError, NotFound

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """``facts`` say what was analysed and found, ``tables`` are rows by name, ``figures`` hold all their numbers."""

    name: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]]
    figures: Mapping[str, Figure]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; numbers that are not finite become null."""
        return {
            "analysis": self.name,
            "facts": _plain(self.facts),
            "tables": _plain(self.tables),
            "figures": {name: _plain(figure.as_dict()) for name, figure in self.figures.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report whose JSON this is."""
        figures = {name: Figure.from_dict(figure) for name, figure in values["figures"].items()}
        return cls(values["analysis"], values["facts"], values["tables"], figures)

    @classmethod
    def load(cls, path: str | Path) -> Report:
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
        paths[0].write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        paths[1].write_text(page.render(self.name, whole["facts"], self.figures), encoding="utf-8")
        for name, rows in self.tables.items():
            paths.append(folder / f"{self.name}-{name}.csv")
            _write_csv(paths[-1], rows)
        for name, figure in self.figures.items() if plots.available() else ():
            paths.append(folder / f"{self.name}-{name}.png")
            plots.draw(figure, paths[-1])
        return paths


def origin() -> dict[str, str]:
    """Versions and the date, for the facts."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"bertology_serve": __version__, "torch": torch.__version__, "date": now}


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
