"""Calls that ask cold deltas: they wait here, for as long as they may, while threads of their own load them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bertology_serve.errors import Expired, Overloaded
from bertology_serve.serving.versions.delta_cache import DeltaCache

LOADERS = 2


class Cold:
    """Belongs to the event loop. At most ``most`` calls wait; single flight for each delta."""

    def __init__(self, tiers: DeltaCache, most: int) -> None:
        self.tiers, self._most = tiers, most
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="loader")
        self.waiting = 0
        self._flights: dict[str, asyncio.Future[object]] = {}

    def close(self) -> None:
        """Loads nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def names(self) -> list[str]:
        """The deltas that are being loaded."""
        return list(self._flights)

    async def ensure(self, names: Sequence[str], seconds: float) -> None:
        """Returns when all those deltas are on the device. Overloaded, Expired, or what is wrong with one of them."""
        cold = [name for name in names if self.tiers.is_cold(name)]
        if not cold:
            return
        if self.waiting >= self._most:
            raise Overloaded(f"{self.waiting} calls wait for deltas to be loaded; try again in 1 s", 1.0)
        self.waiting += 1
        try:
            async with asyncio.timeout(seconds if seconds != float("inf") else None):
                await asyncio.gather(*(asyncio.shield(self._flight(name)) for name in cold))
        except TimeoutError:
            raise Expired(f"delta {cold[0]!r} was not loaded within {seconds:g} s; allow more time, or later") from None
        finally:
            self.waiting -= 1

    def _flight(self, name: str) -> asyncio.Future[object]:
        flight = self._flights.get(name)
        if flight is None:
            loop = asyncio.get_running_loop()
            raise_up: Callable[[str], object] = self.tiers.raise_up
            flight = self._flights[name] = loop.run_in_executor(self._threads, raise_up, name)
            flight.add_done_callback(lambda done: self._landed(name, done))
        return flight

    def _landed(self, name: str, done: asyncio.Future[object]) -> None:
        self._flights.pop(name, None)
        if not done.cancelled():
            done.exception()  # whoever waited was told; nobody may be left
