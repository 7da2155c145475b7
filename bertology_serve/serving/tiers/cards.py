"""What is known of a delta before its tensors are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bertology_serve.deltas import catalog
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.manifest import from_json
from bertology_serve.deltas.names import MANIFEST
from bertology_serve.deltas.reading import Limits, read_json


@dataclass(frozen=True)
class Card(Delta):
    """A delta without tensors, for everything that only asks about it: task, labels, version, kinds, metrics.

    ``path`` is where it lies, ``size`` the bytes of its tensors in float32.
    """

    path: Path = Path()
    size: int = 0

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes, head included."""
        return self.size


def read_card(path: Path, name: str, root: Path) -> Card | None:
    """The card of a directory with ``delta.json``; ``None`` for one of peft's, which says too little by itself.

    Raises FormatError.
    """
    if not (path / MANIFEST).exists():
        return None
    limits = Limits()
    values, _ = read_json(path / MANIFEST, limits, root)
    found = from_json(values, str(path / MANIFEST))
    version = catalog.identify(path, limits, root, name).version
    size = 4 * sum(math.prod(shape) for shape in (*found.tensors.values(), *found.head.values()))
    return Card(
        found.name, found.base, found.task, found.specs, version=version, metrics=found.metrics, path=path, size=size
    )


def card_of(delta: Delta, path: Path) -> Card:
    """The card of a delta that was read."""
    return Card(
        delta.name, delta.base, delta.task, delta.specs, version=delta.version, metrics=delta.metrics,
        path=path, size=delta.bytes,
    )  # fmt: skip
