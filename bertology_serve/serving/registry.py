"""The deltas that a server answers for: found in a directory, checked, made resident."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bertology_serve.deltas import catalog, store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BertologyError, NotFound, nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """A delta directory that could not be loaded, and why."""

    path: Path
    reason: str


class Registry:
    """What answers under which name. One version of each delta: the last one found."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._deltas: dict[str, Delta] = pipeline.deltas

    def load(self, root: Path, skip_bad: bool = False) -> list[Refused]:
        """Makes every delta below ``root`` resident.

        A delta that is malformed, unsafe or made for other weights raises what is wrong with it, or with ``skip_bad``
        is logged and returned. Raises NotFound where there is no delta at all.
        """
        refused: list[Refused] = []
        for name, path in _newest(root, skip_bad, refused).items():
            try:
                self.pipeline.add(self._read(path, name))
            except BertologyError as problem:
                if not skip_bad:
                    raise
                refused.append(Refused(path, str(problem)))
        for refusal in refused:
            log.warning("left out: %s", refusal.reason)
        self._deltas = self.pipeline.deltas
        return refused

    def _read(self, path: Path, name: str) -> Delta:
        encoder = self.pipeline.encoder
        return store.load(path, encoder.anatomy, base=encoder.ref, name=name, options=encoder.config.to_dict())

    def find(self, name: str, version: str | None = None, visible: Callable[[str], bool] = lambda _: True) -> Delta:
        """The delta of that name, at that version where one is named.

        Raises NotFound, whose message names only deltas that are ``visible`` to the caller.
        """
        delta = self._deltas.get(name)
        if delta is None:
            known = [other for other in list(self._deltas) if visible(other)]
            raise NotFound(f"no delta {name[:80]!r}; {nearest(name, known)}; GET /models lists them")
        if version is not None and version != delta.version:
            raise NotFound(f"delta {name!r} has no version {version[:80]!r} here; it answers with {delta.version!r}")
        return delta

    def all(self) -> list[Delta]:
        """The deltas that answer, the bare base first, the others by name."""
        return sorted(self._deltas.values(), key=lambda delta: (delta.name != "base", delta.name))


def _newest(root: Path, skip_bad: bool, refused: list[Refused]) -> dict[str, Path]:
    """The newest version of each delta below ``root``; with ``skip_bad`` each of its directories is read by itself."""
    parts = [root]
    if skip_bad and root.is_dir() and not catalog.is_delta(root):
        parts = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    newest: dict[str, Path] = {}
    for part in parts:
        try:
            newest |= {name: paths[-1] for name, paths in store.discover(part).items()}
        except BertologyError as problem:
            if not skip_bad:
                raise
            refused.append(Refused(part, str(problem)))
    if not newest:
        raise NotFound(f"no usable delta in {root}; expected NAME/VERSION/delta.json below it")
    return newest
