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

import torch

from bertology_serve import __version__
from bertology_serve.analysis import figures as drawing
from bertology_serve.analysis.figures import Figure
from bertology_serve.analysis.page import render
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
