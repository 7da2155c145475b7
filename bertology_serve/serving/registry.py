"""The deltas that a server answers for: found in a directory, checked, made resident."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bertology_serve.deltas import catalog, store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import BASE, Residents
from bertology_serve.errors import BertologyError, NotFound, nearest
from bertology_serve.export.served import OnnxModel, exports
from bertology_serve.serving.splits import Split, Splits
from bertology_serve.serving.tiers.cards import card_of, read_card
from bertology_serve.serving.tiers.tiers import Tiers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """A delta directory that could not be loaded, and why."""

    path: Path
    reason: str


class Registry:
    """What answers under which name: one version of each delta, swapped as a whole. ``root`` is where they lie.

    With ``device_bytes`` only so many deltas are resident at a time, others are loaded when they are asked (``tiers``);
    ``host_bytes`` of those that had to leave stay in memory. For any thread; what changes the same delta belongs one
    after the other (``Lifecycle`` sees to it).
    """

    def __init__(
        self,
        pipeline: Residents,
        root: Path | None = None,
        device_bytes: float = math.inf,
        host_bytes: float = 0,
    ) -> None:
        self.pipeline, self.root = pipeline, root
        self.models: set[str] = set()
        self.splits = Splits()
        self.tiers = Tiers(pipeline, lambda card: self._read(card.path, card.name), device_bytes, host_bytes)

    def load(self, root: Path, skip_bad: bool = False) -> list[Refused]:
        """Makes the newest version of every delta below ``root`` answer.

        All of them are read and resident, or, where the device is bounded, known, and as many resident as fit.
        A delta that is malformed, unsafe or made for other weights raises what is wrong with it, or with ``skip_bad``
        is logged and returned. Raises NotFound where there is no delta at all.
        """
        refused: list[Refused] = []
        self.root = root
        for name, path in newest(root, skip_bad, refused).items():
            try:
                self._take_in(path, name)
            except BertologyError as problem:
                if not skip_bad:
                    raise
                refused.append(Refused(path, str(problem)))
        for refusal in refused:
            log.warning("left out: %s", refusal.reason)
        return refused

    def _take_in(self, path: Path, name: str) -> None:
        card = read_card(path, name, path) if self.tiers.bounded else None
        if card is None:
            delta = self._read(path, name)
            self.tiers.put(card_of(delta, path), delta)
            return
        if not self.pipeline.encoder.is_pruned:  # else it is for what this was pruned from, and cut as it is read
            self.pipeline.check(card)
        self.tiers.register(card)
        if self.tiers.has_room(card):
            self.tiers.raise_up(name)

    def load_models(self, root: Path) -> list[Delta]:
        """Makes the exports of single deltas answer beside the deltas: ``root`` is one, or holds several.

        Each answers under its own name and is not looked after: no other version of it comes. Raises NotFound where
        there is none, FormatError for what is no such export, SpecError for a name that is taken.
        """
        opened = [OnnxModel.open(path) for path in exports(root)]
        for model in opened:
            self.pipeline.add_model(model.delta, model)
            self.models.add(model.delta.name)
        return [model.delta for model in opened]

    def put(self, name: str, version: str | None = None) -> Delta:
        """Makes a version from the served directory answer under ``name`` (``None``: the newest), from one moment on.

        Calls under way finish on the version that they began with. A version that answers already is left alone:
        versions do not change. Raises NotFound, FormatError, BaseMismatch, Unsupported; what answered goes on then.
        """
        if self.root is None:
            raise NotFound("this server has no directory of deltas; start it with --deltas")
        known = catalog.versions(self.root, name)
        chosen = next(reversed(known)) if version is None else version
        if chosen not in known:
            raise NotFound(f"delta {name!r} has no version {chosen[:80]!r}; {nearest(chosen[:80], known)}")
        resident = self.pipeline.resident(name)
        if resident is not None and resident.version == chosen:
            return resident
        delta = self._read(known[chosen], name)
        self.tiers.put(card_of(delta, known[chosen]), delta)
        return delta

    def rollback(self, name: str) -> Delta:
        """Makes the version answer again that answered before; read again only where it had to leave. NotFound."""
        return self.tiers.rollback(name)

    def split(self, name: str, split: Split) -> None:
        """Brings a canary and a shadow up beside the version that answers, and takes away those that are no more.

        Raises NotFound, what is wrong with one of them, Overloaded where there is no room; nothing changes then.
        """
        stale = self.splits.of(name).versions - split.versions
        known = catalog.versions(self.root, name) if self.root is not None and split.versions else {}
        for version in sorted(split.versions):
            if version not in known:
                raise NotFound(f"delta {name!r} has no version {version[:80]!r}; {nearest(version[:80], known)}")
        new = [version for version in sorted(split.versions) if self.pipeline.resident(name, version) is None]
        try:
            for version in new:
                self.tiers.stand_by(self._read(known[version], name))
        except BaseException:
            self.pipeline.dismiss(name, new)
            raise
        self.splits.put(name, split)
        self.pipeline.dismiss(name, stale)

    def remove(self, name: str) -> None:
        """Takes a delta away; its rows are freed once the last call under way has finished. NotFound, Unsupported."""
        self.tiers.remove(name)
        self.pipeline.dismiss(name, self.splits.of(name).versions)
        self.splits.put(name, Split())

    def shelf(self) -> dict[str, list[str]]:
        """The versions that lie in the served directory, by delta, the newest last.

        A directory that cannot be read stands there under its own name, without versions. NotFound without ``root``.
        """
        if self.root is None:
            return {}
        if not self.root.is_dir():
            raise NotFound(f"no directory {self.root}; expected the deltas that are served")
        found: dict[str, list[str]] = {}
        for part in _parts(self.root, skip_bad=True):
            try:
                for name, paths in store.discover(part).items():
                    found.setdefault(name, []).extend(store.identify(path, name=name).version for path in paths)
            except BertologyError:
                found.setdefault(part.name, [])
        return found

    def _read(self, path: Path, name: str) -> Delta:
        return self.pipeline.read(path, name)

    def find(self, name: str, version: str | None = None, visible: Callable[[str], bool] = lambda _: True) -> Delta:
        """The delta of that name, at that version where one is named.

        Raises NotFound, whose message names only deltas that are ``visible`` to the caller.
        """
        chosen = version or self.splits.version(name)
        delta = self.pipeline.resident(name, chosen) or self.pipeline.resident(name) or self.tiers.cards.get(name)
        if delta is None:
            known = [other for other in {**self.pipeline.deltas, **self.tiers.cards} if visible(other)]
            raise NotFound(f"no delta {name[:80]!r}; {nearest(name, known)}; GET /models lists them")
        if version is not None and version != delta.version:
            raise NotFound(f"delta {name!r} has no version {version[:80]!r} here; it answers with {delta.version!r}")
        return delta

    def resident(self) -> list[str]:
        """The deltas that answer at once, without the bare base."""
        return [name for name in self.pipeline.deltas if name != BASE]

    def all(self) -> list[Delta]:
        """The deltas that answer, the bare base first, the others by name; of those on disk only what they say."""
        known = {**self.tiers.cards, **self.pipeline.deltas}
        return sorted(known.values(), key=lambda delta: (delta.name != "base", delta.name))


def newest(root: Path, skip_bad: bool, refused: list[Refused]) -> dict[str, Path]:
    """The newest version of each delta below ``root``; with ``skip_bad`` each of its directories is read by itself."""
    found: dict[str, Path] = {}
    for part in _parts(root, skip_bad):
        try:
            found |= {name: paths[-1] for name, paths in store.discover(part).items()}
        except BertologyError as problem:
            if not skip_bad:
                raise
            refused.append(Refused(part, str(problem)))
    if not found:
        raise NotFound(f"no usable delta in {root}; expected NAME/VERSION/delta.json below it")
    return found


def _parts(root: Path, skip_bad: bool) -> list[Path]:
    """What is read by itself: the whole, or every directory in it, so that one that is malformed spoils no other."""
    if not skip_bad or not root.is_dir() or catalog.is_delta(root):
        return [root]
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
