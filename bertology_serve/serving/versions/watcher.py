"""What changes deltas while the server runs: the desired-state file, or else the served directory.

``{"deltas": {"mood": {"version": "2", "pin": true, "weight": 2, "canary": {"version": "3", "share": 0.1},
"shadow": "4"}}, "others": "keep"}``. Every field may be left out: without ``version`` the newest answers. ``others``
are the deltas that are not named: ``keep`` (the default) leaves them alone, ``unload`` takes them away."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from bertology_serve.deltas.catalog import DeltaVersion, check_name
from bertology_serve.deltas.safe_io import read_regular
from bertology_serve.encoder.pipeline import BASE
from bertology_serve.errors import BertologyError, FormatError, NotFound, SpecError
from bertology_serve.serving.batching.queue import WorkQueue
from bertology_serve.serving.observability.background import OnceLogger
from bertology_serve.serving.versions.canary import Split
from bertology_serve.serving.versions.lifecycle import Lifecycle

LARGEST = 16 * 2**20


@dataclass(frozen=True)
class Canary:
    """A version and its share of the calls."""

    version: str
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise SpecError(f"share is {self.share}; expected a number from 0 to 1")


@dataclass(frozen=True)
class Wish:
    """What is wanted of one delta."""

    version: str | None = None
    pin: bool = False
    weight: float = 1.0
    canary: Canary | None = None
    shadow: str = ""

    def __post_init__(self) -> None:
        if not 1e-6 <= self.weight <= 1e6:
            raise SpecError(f"weight is {self.weight}; expected a number from 1e-6 to 1e6")

    @property
    def split(self) -> Split:
        """What stands beside the version that answers."""
        canary = self.canary or Canary("", 0.0)
        return Split(canary.version, canary.share, self.shadow)


@dataclass(frozen=True)
class Desired:
    """The whole file."""

    deltas: dict[str, Wish] = field(default_factory=dict)
    others: Literal["keep", "unload"] = "keep"


def read_desired(path: Path) -> Desired:
    """The file's content. Raises NotFound, FormatError for what is no such file, SpecError naming the field."""
    if not path.exists():
        raise NotFound(f"cannot read {path}: there is no such file; expected the desired state as JSON")
    content = read_regular(path, LARGEST, str(path))
    try:
        found = msgspec.json.decode(content, type=Desired, strict=True)
        for name, wish in found.deltas.items():
            for word, what in ((name, "delta name"), (wish.version or "1", "version")):
                check_name(word, what)
    except (msgspec.DecodeError, UnicodeDecodeError, FormatError, RecursionError) as problem:
        raise SpecError(f"{path}: {problem}") from None
    return found


log = logging.getLogger(__name__)
FILE = "the desired state"


class Reconciler:
    """Looks at the file every so many ``seconds``. What cannot be had is told and tried again; the rest is done.

    Exports that the server was started with stay, whatever the file says of ``others``.
    """

    def __init__(self, path: Path, lifecycle: Lifecycle, queue: WorkQueue, seconds: float) -> None:
        self._path, self._lifecycle, self._queue, self._seconds = path, lifecycle, queue, seconds
        self._seen: object = None
        self._told = OnceLogger(log)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self.look()

    async def look(self) -> None:
        """Acts where the file is new, or something failed when it was."""
        try:
            found = os.stat(self._path)
            changed = found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
            if changed == self._seen:
                return
            desired = await asyncio.to_thread(read_desired, self._path)
        except BertologyError as problem:
            self._told.say(FILE, str(problem))
            return
        except OSError as problem:
            self._told.say(FILE, f"cannot read {self._path}: {problem.strerror}; what was wanted before holds")
            return
        failed = await self._apply(desired)
        self._told.keep(failed)
        self._seen = None if failed else changed

    async def _apply(self, desired: Desired) -> set[str]:
        """The deltas that are not as they should be."""
        registry, failed = self._lifecycle.registry, set[str]()
        self._queue.weigh({name: wish.weight for name, wish in desired.deltas.items()})
        for name, wish in desired.deltas.items():
            try:
                await self._grant(name, wish)
            except BertologyError as problem:
                self._told.say(name, str(problem))
                failed.add(name)
        if desired.others == "unload":
            others = {delta.name for delta in registry.all()} - desired.deltas.keys() - registry.models - {BASE}
            failed |= {name for name in sorted(others) if not await self._unload(name)}
        return failed

    async def _grant(self, name: str, wish: Wish) -> None:
        registry = self._lifecycle.registry
        if name in registry.models and wish == Wish(weight=wish.weight):
            return
        await self._lifecycle.load(name, wish.version)
        registry.tiers.pin(name, wish.pin)
        await self._lifecycle.split(name, wish.split)

    async def _unload(self, name: str) -> bool:
        """Whether it is gone."""
        try:
            await self._lifecycle.unload(name)
        except NotFound:  # somebody was faster
            pass
        except BertologyError as problem:
            self._told.say(name, str(problem))
            return False
        return True


ROOT = "the served directory"
Shelf = Mapping[str, Sequence[DeltaVersion]]


class Watcher:
    """Looks every so often. Only changes count: what was chosen or unloaded by hand stays so until a new version comes.

    A version that cannot be loaded is tried again at every look, and told of once. A delta has gone when it was missing
    in two looks one after the other; one whose directory cannot be read has not. Exports that the server was started
    with are left alone.
    """

    def __init__(self, lifecycle: Lifecycle, seconds: float) -> None:
        self._lifecycle, self._seconds = lifecycle, seconds
        self._seen: dict[str, tuple[str, Path]] = {}
        self._missing: set[str] = set()
        self._told = OnceLogger(log)
        for card in list(lifecycle.registry.tiers.cards.values()):
            self._seen[card.name] = card.version, card.path

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                shelf = await self._lifecycle.shelf()
            except BertologyError as problem:
                self._told.say(ROOT, str(problem))
            else:
                await self.look(shelf)

    async def look(self, shelf: Shelf) -> None:
        self._told.keep(set(shelf))
        for name, versions in shelf.items():
            newest = versions[-1] if versions else None
            if newest and self._seen.get(name) != (newest.version, newest.path) and not self._is_fixed(name):
                await self._load(newest)
        missing = self._seen.keys() - shelf.keys()
        for name in missing & self._missing:
            await self._unload(name)
        self._missing = missing & self._seen.keys()

    def _is_fixed(self, name: str) -> bool:
        return name in self._lifecycle.registry.models

    async def _load(self, newest: DeltaVersion) -> None:
        try:
            await self._lifecycle.load(newest.name, newest.version)
        except BertologyError as problem:
            self._told.say(newest.name, str(problem))
        else:
            self._seen[newest.name] = newest.version, newest.path
            self._told.over(newest.name)

    async def _unload(self, name: str) -> None:
        try:
            await self._lifecycle.unload(name)
        except NotFound:  # somebody was faster
            pass
        except BertologyError as problem:
            self._told.say(name, str(problem))
            return
        del self._seen[name]
