"""Makes what is served what the desired-state file says: at the start, and whenever the file has changed."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from bertology_serve.errors import BertologyError
from bertology_serve.serving.desired import Desired, Wish, read_desired
from bertology_serve.serving.lifecycle import Lifecycle
from bertology_serve.serving.queue import WorkQueue

log = logging.getLogger(__name__)


class Reconciler:
    """Looks at the file every so many ``seconds``. What cannot be had is told and tried again; the rest is done."""

    def __init__(self, path: Path, lifecycle: Lifecycle, queue: WorkQueue, seconds: float) -> None:
        self._path, self._lifecycle, self._queue, self._seconds = path, lifecycle, queue, seconds
        self._seen = -1
        self._told: set[str] = set()

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            await self.look()

    async def look(self) -> None:
        """Acts where the file is new, or something failed when it was."""
        try:
            changed = self._path.stat().st_mtime_ns
            if changed == self._seen:
                return
            desired = await asyncio.to_thread(read_desired, self._path)
        except (BertologyError, OSError) as problem:
            self._tell(str(problem))
            return
        failed = await self._apply(desired)
        if not failed:
            self._seen = changed
            self._told.clear()

    async def _apply(self, desired: Desired) -> int:
        """How many deltas are not as they should be."""
        failed = 0
        self._queue.weigh({name: wish.weight for name, wish in desired.deltas.items()})
        for name, wish in desired.deltas.items():
            try:
                await self._grant(name, wish)
            except BertologyError as problem:
                self._tell(f"{name}: {problem}")
                failed += 1
        if desired.others == "unload":
            for name in {delta.name for delta in self._lifecycle.registry.all()} - desired.deltas.keys() - {"base"}:
                await self._lifecycle.unload(name)
        return failed

    async def _grant(self, name: str, wish: Wish) -> None:
        registry = self._lifecycle.registry
        await self._lifecycle.load(name, wish.version)
        registry.tiers.pin(name, wish.pin)
        await self._lifecycle.split(name, wish.split)

    def _tell(self, problem: str) -> None:
        if problem not in self._told:
            log.warning("desired state: %s", problem)
            self._told.add(problem)
