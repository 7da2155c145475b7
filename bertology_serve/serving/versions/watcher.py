"""Follows the served directory: the newest version of a delta answers, and what has gone is taken away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from bertology_serve.deltas.catalog import DeltaVersion
from bertology_serve.errors import BertologyError, NotFound
from bertology_serve.serving.observability.background import Told
from bertology_serve.serving.versions.lifecycle import Lifecycle

log = logging.getLogger(__name__)
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
        self._told = Told(log)
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
