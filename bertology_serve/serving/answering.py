"""What every protocol does between reading a call and writing its answer: rights, rates, time, one version."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import NotFound, VersionGone
from bertology_serve.serving.batching.scheduler import CallOptions
from bertology_serve.serving.execution.engine import Engine
from bertology_serve.serving.keys import Access
from bertology_serve.serving.versions.canary import Shadows
from bertology_serve.serving.versions.cold import Cold
from bertology_serve.serving.versions.delta_registry import Registry

SWAPS = 8
ONE = ("",)
T = TypeVar("T")


class Answering:
    """An engine and its deltas, as one caller may use them; ``cold`` brings those that are not resident."""

    def __init__(self, engine: Engine, registry: Registry, cold: Cold) -> None:
        self.engine, self.registry, self.cold = engine, registry, cold
        self.shadows = Shadows(engine, registry.splits)

    def find(self, access: Access, name: str, version: str | None = None) -> Delta:
        """The delta of that name, where the caller may ask it. Raises Forbidden, NotFound."""
        access.check(name)
        return self.registry.find(name, version, access.allows)

    def visible(self, access: Access) -> list[Delta]:
        """The deltas that answer the caller."""
        return [delta for delta in self.registry.all() if access.allows(delta.name)]

    async def answer(
        self,
        access: Access,
        items: Sequence[Request],
        terms: CallOptions,
    ) -> list[Prediction]:
        """The answers, within the caller's rights and time; charged to its rates unless the terms say otherwise. See
        ``Engine.answer``."""
        names = list(dict.fromkeys(item.delta for item in items))
        if access.restricted:
            for name in names:
                self.find(access, name)
        if self.registry.splits:
            items = [self._routed(item) for item in items]
        if terms.charge is None:
            terms = replace(terms, charge=access.charge)
        found = await self._answer(names, items, terms)
        if self.registry.splits:
            self.shadows.send(items, found)
        return found

    def _routed(self, item: Request) -> Request:
        """The item as the canary's, where it names no version and the canary is due."""
        version = "" if item.version else self.registry.splits.version(item.delta)
        return replace(item, version=version) if version else item

    async def _answer(
        self,
        names: Sequence[str],
        items: Sequence[Request],
        terms: CallOptions,
    ) -> list[Prediction]:
        tiers = self.registry.tiers
        if not any(tiers.is_cold(name) for name in names):
            tiers.touch(names)
            try:
                return await self.engine.answer(items, terms)
            except VersionGone:
                raise
            except NotFound:
                if not any(tiers.is_cold(name) for name in names):  # else one left for disk just now
                    raise
        return await self._warmed(names, items, terms)

    async def _warmed(
        self,
        names: Sequence[str],
        items: Sequence[Request],
        terms: CallOptions,
    ) -> list[Prediction]:
        """The answers once the deltas are there; leased, so that none leaves before its work is done."""
        seconds = min(terms.seconds, self.engine.config.max_call_seconds)
        started = time.monotonic()
        with self.registry.tiers.lease(names):
            await self.cold.ensure(names, seconds)
            left = seconds - (time.monotonic() - started)
            return await self.engine.answer(items, replace(terms, seconds=max(left, 1e-3)))


def size_of(found: Sequence[Prediction]) -> int:
    """How much there is to write, about as much work as to read so many characters."""
    return sum(20 + len(one.answer.get("embedding", one.answer.get("scores", ONE))) for one in found)


async def of_one_version(answer: Callable[[], Awaitable[T]]) -> T:
    """Reads the call again where another version came between reading and queueing it, so that both are of one."""
    for _ in range(SWAPS):
        try:
            return await answer()
        except VersionGone:
            continue
    return await answer()
