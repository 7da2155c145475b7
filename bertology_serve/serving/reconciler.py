"""Makes what is served what the desired-state file says: at the start, and whenever the file has changed."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from bertology_serve.encoder.pipeline import BASE
from bertology_serve.errors import BertologyError, NotFound
from bertology_serve.serving.background import Told
from bertology_serve.serving.desired import Desired, Wish, read_desired
from bertology_serve.serving.lifecycle import Lifecycle
from bertology_serve.serving.queue import WorkQueue

log = logging.getLogger(__name__)
FILE = "the desired state"


class Reconciler:
    """Looks at the file every so many ``seconds``. What cannot be had is told and tried again; the rest is done.

    Exports that the server was started with stay, whatever the file says of ``others``.
    """

    def __init__(self, path: Path, lifecycle: Lifecycle, queue: WorkQueue, seconds: float) -> None:
        self._path, self._lifecycle, self._queue, self._seconds = path, lifecycle, queue, seconds
        self._seen: object = None
        self._told = Told(log)

    async def run(self) -> None:
        """Goes on until it is cancelled."""
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
