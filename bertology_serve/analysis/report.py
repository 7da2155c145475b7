"""What an analysis returns, and how it lies on disk: one JSON, a CSV a table, a PNG a figure, one HTML page."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bertology_serve import __version__
from bertology_serve.analysis import page, plots
from bertology_serve.analysis.figures import Figure
from bertology_serve.analysis.subject_model import Subject
from bertology_serve.encoder.encoder import weights_hash
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


KEY = "content"  # the fact that holds the key


def content_key(name: str, subjects: Sequence[Subject], files: Sequence[str | Path | None], *settings: Any) -> str:
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
    folder: Path, name: str, key: str, make: Callable[[], Report], again: bool = False
) -> tuple[Report, bool]:
    """The report that lies in a folder if its key is this one, else (or ``again``) a new one; whether it lay there."""
    file = folder / f"{name}.json"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["facts"][KEY] == key and not again:
            return Report.from_dict(held), True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no report, or none of ours: it is made
    report = make()
    return replace(report, facts={**report.facts, KEY: key}), False
