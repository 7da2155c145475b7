"""The deltas that a server answers for: found in a directory, checked, made resident."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

from bertology_serve.deltas import catalog
from bertology_serve.deltas.catalog import DeltaVersion, InvalidDelta
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.safe_io import untrusted
from bertology_serve.encoder.opening import WholeModel, task_models
from bertology_serve.encoder.pipeline import BASE, DeltaSet
from bertology_serve.errors import BertologyError, NotFound, SpecError, nearest, printable
from bertology_serve.export.onnx_engine import OnnxModel, exports
from bertology_serve.serving.observability.background import OnceLogger
from bertology_serve.serving.versions.canary import Splits
from bertology_serve.serving.versions.cards import card_of, read_card
from bertology_serve.serving.versions.delta_cache import DeltaCache
from bertology_serve.serving.versions.desired import Split

log = logging.getLogger(__name__)


class Registry:
    """What answers under which name: one version of each delta, swapped as a whole. ``root`` is where they lie.

    With ``device_bytes`` only so many deltas are resident at a time, others are loaded when they are asked (``tiers``);
    ``host_bytes`` of those that had to leave stay in memory. For any thread; what changes the same delta belongs one
    after the other (``Lifecycle`` sees to it).
    """

    def __init__(
        self,
        pipeline: DeltaSet,
        root: Path | None = None,
        device_bytes: float = math.inf,
        host_bytes: float = 0,
    ) -> None:
        self.pipeline, self.root = pipeline, root
        self.models: set[str] = set()
        self.splits = Splits()
        self._told = OnceLogger(log)
        self.tiers = DeltaCache(pipeline, lambda card: self._read(card.path, card.name), device_bytes, host_bytes)

    def load(self, root: Path, skip_bad: bool = False) -> list[InvalidDelta]:
        """Makes the newest version of every delta below ``root`` answer.

        All of them are read and resident, or, where the device is bounded, known, and as many resident as fit.
        A delta that is malformed, unsafe or made for other weights raises what is wrong with it, or with ``skip_bad``
        is logged and returned. Raises NotFound where there is no delta at all.
        """
        self.root = root
        refused: list[InvalidDelta] = []
        for one in newest(root, skip_bad, refused):
            try:
                self._take_in(one)
            except BertologyError as problem:
                if not skip_bad:
                    raise
                refused.append(InvalidDelta(one.path, problem))
        for refusal in refused:
            log.warning("left out: %s", printable(refusal.reason))
        return refused

    def _take_in(self, one: DeltaVersion) -> None:
        with untrusted(one.path):
            card = read_card(one.path, one.name, one.path) if self.tiers.bounded else None
            if card is None:
                delta = self._read(one.path, one.name)
                self.tiers.put(card_of(delta, one.path), delta)
            else:
                if not self.pipeline.encoder.is_pruned:  # else it is for what this was pruned from, and cut as read
                    self.pipeline.check(card)
                self.tiers.register(card)
                if self.tiers.has_room(card):
                    self.tiers.raise_up(one.name)
        self._note_name(one)

    def _note_name(self, one: DeltaVersion) -> None:
        """A bare directory may have been renamed; its delta answers under the name that it was given."""
        if one.bare and one.path.name != one.name:
            reason = f"answers as {one.name!r}, the name in its delta.json, not as the directory is called"
            self._told.say(str(one.path), reason)

    def load_models(self, root: Path) -> list[Delta]:
        """Makes exports of single deltas, and whole task models, answer beside the deltas: ``root`` is one, or holds
        several.

        Each answers under its own name and is not looked after: no other version of it comes. Raises NotFound where
        there is none, FormatError for what is no such export, SpecError for a name that is taken.
        """
        whole = [WholeModel.open(path) for path in task_models(root)]
        opened: list[OnnxModel | WholeModel] = [
            *whole,
            *(OnnxModel.open(path) for path in exports(root, some=not whole)),
        ]
        for model in opened:
            self.pipeline.add_model(model.delta, model)
            self.models.add(model.delta.name)
        return [model.delta for model in opened]

    def put(self, name: str, version: str | None = None) -> Delta:
        """Makes a version from the served directory answer under ``name`` (``None``: the newest), from one moment on.

        Calls under way finish on the version that they began with. A version that answers already is left alone:
        versions do not change. Raises NotFound, FormatError, BaseMismatch, Unsupported; what answered goes on then.
        """
        if name in self.models:
            raise SpecError(f"{name!r} is an export that the server was started with; no other version of it comes")
        known = self._known(name)
        chosen = next(reversed(known)) if version is None else version
        if chosen not in known:
            raise NotFound(f"delta {name!r} has no version {chosen[:80]!r}; {nearest(chosen[:80], known)}")
        one = known[chosen]
        resident, card = self.pipeline.resident(name), self.tiers.cards.get(name)
        moved = card is not None and card.path != one.path  # else it would be looked for where it was
        if resident is not None and resident.version == chosen and not moved:
            return resident
        with untrusted(one.path):
            delta = self._read(one.path, name)
            card = card_of(delta, one.path)
        self.tiers.put(card, delta)
        self._note_name(one)
        return delta

    def _known(self, name: str) -> dict[str, DeltaVersion]:
        """The versions of a delta in the served directory, the newest last. NotFound, FormatError."""
        if self.root is None:
            raise NotFound("this server has no directory of deltas; start it with --deltas")
        refused: list[InvalidDelta] = []
        try:
            return catalog.versions(self.root, name, refused=refused)
        finally:
            for one in refused:
                self._told.say(str(one.path), one.reason)

    def rollback(self, name: str) -> Delta:
        """Makes the version answer again that answered before; read again only where it had to leave. NotFound."""
        return self.tiers.rollback(name)

    def split(self, name: str, split: Split) -> None:
        """Brings a canary and a shadow up beside the version that answers, and takes away those that are no more.

        Raises NotFound, what is wrong with one of them, Overloaded where there is no room; nothing changes then.
        """
        stale = self.splits.of(name).versions - split.versions
        known = self._known(name) if self.root is not None and split.versions else {}
        for version in sorted(split.versions):
            if version not in known:
                raise NotFound(f"delta {name!r} has no version {version[:80]!r}; {nearest(version[:80], known)}")
        new = [version for version in sorted(split.versions) if self.pipeline.resident(name, version) is None]
        try:
            for version in new:
                with untrusted(known[version].path):
                    delta = self._read(known[version].path, name)
                self.tiers.stand_by(delta)
        except BaseException:
            self.pipeline.remove_versions(name, new)
            raise
        self.splits.put(name, split)
        self.pipeline.remove_versions(name, stale)

    def remove(self, name: str) -> None:
        """Takes a delta away; its rows are freed once the last call under way has finished. NotFound, Unsupported."""
        self.tiers.remove(name)
        self.models.discard(name)
        self.pipeline.remove_versions(name, self.splits.of(name).versions)
        self.splits.put(name, Split())

    def shelf(self) -> dict[str, list[DeltaVersion]]:
        """The versions that lie in the served directory, by delta, the newest last.

        What cannot be identified is logged, and what may be its delta stands there without versions; so does one that
        was read from there, whatever else lies there of it. NotFound, or FormatError, where there is no ``root`` or it
        cannot be read.
        """
        if self.root is None:
            return {}
        found, refused = catalog.survey(self.root)
        there = {str(one.path) for versions in found.values() for one in versions}
        for bad in refused:
            self._told.say(str(bad.path), bad.reason)
            there.add(str(bad.path))
            found.setdefault(_called(bad.path, self.root), [])
            found |= {name: [] for name in self._read_from(bad.path)}
        self._told.keep(there)
        return found

    def _read_from(self, path: Path) -> list[str]:
        return [card.name for card in list(self.tiers.cards.values()) if card.path.is_relative_to(path)]

    def _read(self, path: Path, name: str) -> Delta:
        return self.pipeline.read(path, name)

    def find(self, name: str, version: str | None = None, visible: Callable[[str], bool] = lambda _: True) -> Delta:
        """The delta of that name, at that version where one is named.

        Raises NotFound, whose message names only deltas that are ``visible`` to the caller.
        """
        delta = self.pipeline.resident(name, version or "") or self.answering(name)
        if delta is None:
            known = [other for other in {**self.pipeline.deltas, **self.tiers.cards} if visible(other)]
            raise NotFound(f"no delta {name[:80]!r}; {nearest(name, known)}; GET /models lists them")
        if version is not None and version != delta.version:
            raise NotFound(f"delta {name!r} has no version {version[:80]!r} here; it answers with {delta.version!r}")
        return delta

    def answering(self, name: str) -> Delta | None:
        """The version that answers where a call names none; of one on disk only what it says."""
        return self.pipeline.resident(name) or self.tiers.cards.get(name)

    def resident(self) -> list[str]:
        """The deltas that answer at once, without the bare base."""
        return [name for name in self.pipeline.deltas if name != BASE]

    def all(self) -> list[Delta]:
        """The deltas that answer, the bare base first, the others by name; of those on disk only what they say."""
        known = {**self.tiers.cards, **self.pipeline.deltas}
        return sorted(known.values(), key=lambda delta: (delta.name != "base", delta.name))


def newest(root: Path, skip_bad: bool, refused: list[InvalidDelta]) -> list[DeltaVersion]:
    """The newest version of each delta below ``root``; with ``skip_bad`` what cannot be identified goes to ``refused``.

    NotFound where there is none.
    """
    deltas, bad = catalog.survey(root)
    for one in bad:
        if not skip_bad:
            raise one.problem
        refused.append(one)
    if not deltas:
        raise NotFound(f"no usable delta in {root}; expected NAME/VERSION/delta.json below it")
    return [versions[-1] for versions in deltas.values()]


def _called(path: Path, root: Path) -> str:
    """What a directory that cannot be identified is shown as: the first name below the root."""
    parts = path.relative_to(root).parts
    return parts[0] if parts else path.name
