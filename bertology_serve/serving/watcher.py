"""Follows the served directory: the newest version of a delta answers, and what has gone is taken away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence

from bertology_serve.encoder.pipeline import BASE
from bertology_serve.errors import BertologyError, NotFound
from bertology_serve.serving.lifecycle import Lifecycle

log = logging.getLogger(__name__)
Shelf = Mapping[str, Sequence[str]]


class Watcher:
    """Looks every so often. Only changes count: what was chosen or unloaded by hand stays so until a new version comes.

    A version that cannot be loaded is tried again at every look, and told of once. A delta has gone when it was missing
    in two looks one after the other; one whose directory cannot be read has not.
    """

    def __init__(self, lifecycle: Lifecycle, seconds: float) -> None:
        self._lifecycle, self._seconds = lifecycle, seconds
        self._seen: dict[str, str] = {}
        self._missing: set[str] = set()
        self._told: dict[str, str] = {}

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        registry = self._lifecycle.registry
        fixed = {BASE, *registry.models}
        self._seen = {delta.name: delta.version for delta in registry.all() if delta.name not in fixed}
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self.look(await self._lifecycle.shelf())
            except (BertologyError, OSError) as problem:
                self._tell("the served directory", str(problem))

    async def look(self, shelf: Shelf) -> None:
        """Acts on what has changed since the last look."""
        for name, versions in shelf.items():
            if versions and self._seen.get(name) != versions[-1]:
                await self._load(name, versions[-1])
        missing = self._seen.keys() - shelf.keys()
        for name in missing & self._missing:
            await _quietly(self._lifecycle.unload(name))
            del self._seen[name]
        self._missing = set(missing)

    async def _load(self, name: str, version: str) -> None:
        try:
            await self._lifecycle.load(name, version)
        except BertologyError as problem:
            self._tell(name, str(problem))
        else:
            self._seen[name] = version
            self._told.pop(name, None)

    def _tell(self, what: str, reason: str) -> None:
        if self._told.get(what) != reason:
            log.warning("%s: %s", what, reason)
        self._told[what] = reason


async def _quietly(unload: Awaitable[None]) -> None:
    try:
        await unload
    except NotFound:  # somebody was faster
        return
