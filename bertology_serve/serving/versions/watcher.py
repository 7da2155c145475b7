"""What changes deltas while the server runs: the desired state, by a file or a call, or else the served directory."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bertology_serve.deltas.catalog import DeltaVersion
from bertology_serve.encoder.pipeline import BASE
from bertology_serve.errors import BertologyError, NotFound
from bertology_serve.serving.batching.queue import WorkQueue
from bertology_serve.serving.observability.background import OnceLogger
from bertology_serve.serving.versions.desired import Desired, Wish, read_desired
from bertology_serve.serving.versions.lifecycle import Lifecycle

log = logging.getLogger(__name__)
FILE = "the desired state"


class Reconciler:
    """Makes deltas what is wanted of them: by ``apply``, and with ``path`` by a file that is looked at every so many
    ``seconds``. The rest is done where something cannot be had. That is told, and from a file it alone is tried again.

    Exports that the server was started with stay, whatever is said of ``others``.
    """

    def __init__(self, path: Path | None, lifecycle: Lifecycle, queue: WorkQueue, seconds: float = 0.0) -> None:
        self._path, self._lifecycle, self._queue, self._seconds = path, lifecycle, queue, seconds
        self._seen: object = None
        self._left = Desired()  # what the file says and is not so yet
        self._told = OnceLogger(log)

    async def run(self) -> None:
        """Looks at the file until it is cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.look()

    async def look(self) -> None:
        """Does what the file says where it is new, and else only what failed so far."""
        assert self._path is not None, "without a file there is nothing to look at"
        try:
            found = os.stat(self._path)
            changed = found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size
            if changed != self._seen:
                self._left, self._seen = await asyncio.to_thread(read_desired, self._path), changed
            elif not self._left.deltas:
                return
        except BertologyError as problem:
            self._told.say(FILE, str(problem))
            return
        except OSError as problem:
            self._told.say(FILE, f"cannot read {self._path}: {problem.strerror}; what was wanted before holds")
            return
        failed = await self.apply(self._left)
        for name, reason in failed.items():
            self._told.say(name, reason)
        self._told.keep(set(failed))
        self._left = self._left.only(failed)

    async def apply(self, desired: Desired) -> dict[str, str]:
        """Why which deltas are not as they should be; empty where all are."""
        registry, failed = self._lifecycle.registry, dict[str, str]()
        self._queue.weigh({name: wish.weight for name, wish in desired.deltas.items()})
        gone = {name for name, wish in desired.deltas.items() if not wish.loaded}
        if desired.others == "unload":
            gone |= {delta.name for delta in registry.all()} - desired.deltas.keys() - registry.models - {BASE}
        for name, wish in desired.deltas.items():
            if wish.loaded:
                try:
                    await self._grant(name, wish)
                except BertologyError as problem:
                    failed[name] = str(problem)
        for name in sorted(gone):
            try:
                await self._lifecycle.unload(name)
            except NotFound:  # it is not there, as it should be
                pass
            except BertologyError as problem:
                failed[name] = str(problem)
        return failed

    async def _grant(self, name: str, wish: Wish) -> None:
        registry = self._lifecycle.registry
        if name in registry.models and wish == Wish(weight=wish.weight):
            return
        await self._lifecycle.load(name, wish.version)
        registry.tiers.pin(name, wish.pin)
        await self._lifecycle.split(name, wish.split)


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
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            try:
                shelf = await self._lifecycle.shelf()
            except BertologyError as problem:
                self._told.say(ROOT, str(problem))
            else:
                await self.look(shelf)

    async def look(self, shelf: Shelf) -> None:
        """Acts on what has changed since the last look."""
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
