"""What is known of a delta before its tensors are read."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from bertology_serve.deltas import catalog
from bertology_serve.deltas.catalog import MANIFEST, check_name
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.format import from_json, kinds_record, metrics_of, metrics_record, specs_of
from bertology_serve.deltas.safe_io import Limits, build, conform, read_json, untrusted
from bertology_serve.errors import FormatError
from bertology_serve.files import JsonMapping, JsonObject
from bertology_serve.tasks.spec import TaskSpec


@dataclass(frozen=True)
class ServedDelta(Delta):
    """A delta without tensors, for everything that only asks about it: task, labels, version, kinds, metrics.

    ``path`` is where it lies, ``size`` the bytes of its tensors in float32. Where an executor of another process has
    read it, and keeps it for as long as this is there, ``number`` is what it goes by there, ``resident`` the bytes that
    it takes.
    """

    path: Path = Path()
    size: int = 0
    number: int = -1
    resident: int = 0

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes, head included."""
        return self.size


def read_card(path: Path, name: str, root: Path) -> ServedDelta | None:
    """The card of a directory with ``delta.json``; ``None`` for one of peft's, which says too little by itself.

    Raises FormatError.
    """
    if not os.path.lexists(path / MANIFEST):
        return None
    limits = Limits()
    with untrusted(path):
        values, _ = read_json(path / MANIFEST, limits, root)
        found = from_json(values, str(path / MANIFEST))
        version = catalog.identify(path, limits, root, name).version
        catalog.check_called(path, found.name, name)
    size = 4 * sum(math.prod(shape) for shape in (*found.tensors.values(), *found.head.values()))
    return ServedDelta(
        found.name, found.base, found.task, found.specs, version=version, metrics=found.metrics, path=path, size=size
    )


def card_of(delta: Delta, path: Path) -> ServedDelta:
    """The card of a delta that was read."""
    return ServedDelta(
        delta.name, delta.base, delta.task, delta.specs, version=delta.version, metrics=delta.metrics,
        path=path, size=delta.bytes,
    )  # fmt: skip


def to_record(card: ServedDelta) -> JsonObject:
    """A card as plain values, for JSON."""
    return {
        "name": card.name,
        "base": asdict(card.base),
        "task": asdict(card.task),
        "kinds": kinds_record(card.specs),
        "version": card.version,
        "metrics": metrics_record(card.metrics),
        "path": str(card.path),
        "size": card.size,
    }


def from_record(record: JsonMapping, number: int = -1, resident: int = 0) -> ServedDelta:
    """The card that ``to_record`` wrote, as an executor keeps it; FormatError for what is none."""
    where = "the card"
    lacking = {"name", "base", "task", "kinds", "version", "metrics", "path", "size"} - record.keys()
    if lacking:
        raise FormatError(f"{where} lacks {min(lacking)!r}")
    return ServedDelta(
        check_name(record["name"], f"{where}: name"),
        build(BaseRef, record["base"], f"{where}: base"),
        build(TaskSpec, record["task"], f"{where}: task"),
        specs_of(record["kinds"], where),
        version=conform(record["version"], str, f"{where}: version"),
        metrics=metrics_of(record["metrics"], f"{where}: metrics"),
        path=Path(conform(record["path"], str, f"{where}: path")),
        size=conform(record["size"], int, f"{where}: size"),
        number=number,
        resident=resident,
    )
