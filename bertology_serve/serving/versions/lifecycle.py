"""Deltas come and go while the server answers: on threads of their own, one change of a delta after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

from bertology_serve.deltas.catalog import DeltaVersion
from bertology_serve.deltas.delta import Delta
from bertology_serve.errors import BertologyError, Expired, NotFound, Overloaded
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import Split
from bertology_serve.tasks.answers import Version

log = logging.getLogger(__name__)
READY, UNAVAILABLE, LOADING, UNLOADING = "READY", "UNAVAILABLE", "LOADING", "UNLOADING"
LOADERS = 2  # threads for what is told, and as many for what calls wait for
T = TypeVar("T")


class Lifecycle:
    """Loads and unloads, when told to and when a call asks a cold delta: at most ``most_cold`` calls wait for that.

    Belongs to the event loop; threads of its own do the work, never the one of the batches.
    """

    def __init__(self, registry: Registry, metrics: Metrics, most_cold: int = 256) -> None:
        self.registry, self._metrics, self._most_cold = registry, metrics, most_cold
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="loader")
        self._cold_loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="loader")
        self._flights: dict[str, asyncio.Future[Delta]] = {}
        self.waiting_calls = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # there while somebody holds it
        self._doing: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    async def load(self, name: str, version: str | None = None) -> Delta:
        """Makes a version answer; the newest where none is named. Raises what is wrong with it, and nothing changes."""
        async with self._lock(name):
            before = self.registry.answering(name)
            with self._telling(name, LOADING):
                delta = await self._run(lambda: self.registry.put(name, version))
        if before is None or before.version != delta.version:
            log.info("delta %s: version %s answers", delta.name, delta.version)
        return delta

    async def split(self, name: str, split: Split) -> None:
        """Gives a canary its share and a shadow its copies; raises what is wrong with them, and nothing changes."""
        async with self._lock(name):
            await self._run(lambda: self.registry.split(name, split))

    async def rollback(self, name: str) -> Delta:
        """Makes the version answer that answered before. NotFound where there was none."""
        async with self._lock(name):
            delta = await self._run(lambda: self.registry.rollback(name))
        log.info("delta %s: back to version %s", delta.name, delta.version)
        return delta

    async def unload(self, name: str) -> None:
        """Takes a delta away; calls under way are answered."""
        async with self._lock(name):
            with self._telling(name, UNLOADING):
                await self._run(lambda: self.registry.remove(name))
            self._reasons[name] = "unloaded"
        log.info("delta %s: unloaded", name)

    async def warm(self, names: Sequence[str], seconds: float, started: float) -> None:
        """Returns when all those deltas are on the device; a delta is loaded once, whoever waits for it. Overloaded,
        Expired so many seconds after ``started`` (of ``time.monotonic``), or what is wrong with one of them.
        """
        cold = [name for name in names if self.registry.tiers.is_cold(name)]
        if not cold:
            return
        if self.waiting_calls >= self._most_cold:
            raise Overloaded(f"{self.waiting_calls} calls wait for deltas to be loaded; try again in 1 s", 1.0)
        self.waiting_calls += 1
        try:
            async with asyncio.timeout(started + seconds - time.monotonic()):
                await asyncio.gather(*(asyncio.shield(self._flight(name)) for name in cold))
        except TimeoutError:
            raise Expired(f"delta {cold[0]!r} was not loaded within {seconds:g} s; allow more time, or later") from None
        finally:
            self.waiting_calls -= 1

    def loading(self) -> list[str]:
        return list(self._flights)

    async def index(self, ready_only: bool = False) -> list[Version]:
        """Every version that lies in the served directory or answers, by name."""
        shelf = await self.shelf()
        answering = {delta.name: delta.version for delta in self.registry.all()}
        entries: list[Version] = []
        for name in sorted(shelf.keys() | answering.keys(), key=lambda name: (name != "base", name)):
            current = answering.get(name)
            others = [one.version for one in shelf.get(name, ()) if one.version != current]
            if not ready_only:
                entries += [self._entry(name, version, current) for version in others]
            if current is not None:
                entries.append(Version(name, current, READY))
        return entries

    async def shelf(self) -> dict[str, list[DeltaVersion]]:
        """What lies in the served directory, see ``Registry.shelf``. Reasons of what is not there are forgotten."""
        shelf = await self._run(self.registry.shelf)
        self._reasons = {name: reason for name, reason in self._reasons.items() if name in shelf}
        return shelf

    def close(self) -> None:
        for threads in (self._loaders, self._cold_loaders):
            threads.shutdown(wait=False, cancel_futures=True)

    def _flight(self, name: str) -> asyncio.Future[Delta]:
        flight = self._flights.get(name)
        if flight is None:
            loop = asyncio.get_running_loop()
            flight = loop.run_in_executor(self._cold_loaders, self.registry.tiers.raise_up, name)
            self._flights[name] = flight
            flight.add_done_callback(lambda done: self._landed(name, done))
        return flight

    def _landed(self, name: str, done: asyncio.Future[Delta]) -> None:
        self._flights.pop(name, None)
        if not done.cancelled():
            done.exception()  # whoever waited was told; nobody may be left

    def _entry(self, name: str, version: str, current: str | None) -> Version:
        state = self._doing.get(name, UNAVAILABLE)
        reason = f"version {current} answers" if current else self._reasons.get(name, "not loaded")
        return Version(name, version, state, reason if state == UNAVAILABLE else "")

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loaders, work)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    @contextmanager
    def _telling(self, name: str, state: str) -> Iterator[None]:
        """The state while it lasts, and the reason where it ends badly."""
        self._doing[name] = state
        try:
            yield
            self._reasons.pop(name, None)
        except BertologyError as problem:
            if not isinstance(problem, NotFound):  # anybody may ask for names that are not there
                self._reasons[name] = str(problem)
            if state == LOADING:
                problem.args = (f"failed to load {name[:80]!r}: {problem}",)
            raise
        finally:
            del self._doing[name]
            deltas = self.registry.all()
            self._metrics.deltas(len(deltas))
            self._metrics.statistics.keep(deltas)
