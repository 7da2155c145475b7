"""What every protocol does between reading a call and writing its answer: rights, rates, time, one version."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import VersionGone
from bertology_serve.serving.engine import Engine
from bertology_serve.serving.keys import Access
from bertology_serve.serving.registry import Registry

SWAPS = 8
T = TypeVar("T")


class Answering:
    """An engine and its deltas, as one caller may use them."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self.engine, self.registry = engine, registry

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
        gone: Callable[[], Awaitable[None]] | None = None,
        charge: Callable[[int], None] | None = None,
        seconds: float = math.inf,
        priority: int = 0,
    ) -> list[Prediction]:
        """The answers, within the caller's rights, rates and time. See ``Engine.answer``."""
        if access.restricted:
            for name in dict.fromkeys(item.delta for item in items):
                self.find(access, name)
        return await self.engine.answer(items, gone, charge or access.charge, seconds, priority)


async def of_one_version(answer: Callable[[], Awaitable[T]]) -> T:
    """Reads the call again where another version came between reading and queueing it, so that both are of one."""
    for _ in range(SWAPS):
        try:
            return await answer()
        except VersionGone:
            continue
    return await answer()
