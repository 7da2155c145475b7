"""Which version answers a call that names none: a canary takes a share, a shadow sees a copy."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """``canary`` is the version that answers ``share`` of the calls; ``shadow`` one that is asked too, in vain."""

    canary: str = ""
    share: float = 0.0
    shadow: str = ""

    @property
    def versions(self) -> set[str]:
        """The versions that stand beside the one that answers."""
        return {version for version in (self.canary, self.shadow) if version}


class Splits:
    """The splits by delta. ``draw()`` gives numbers from 0 to 1."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._splits: dict[str, Split] = {}
        self._draw = draw

    def __bool__(self) -> bool:
        return bool(self._splits)

    def of(self, name: str) -> Split:
        """A delta's split; without one nothing stands beside it."""
        return self._splits.get(name, Split())

    def put(self, name: str, split: Split) -> None:
        """Sets a delta's split, or ends it."""
        if split.versions:
            self._splits[name] = split
        else:
            self._splits.pop(name, None)

    def version(self, name: str) -> str:
        """The canary's version where this call is one of its, else nothing."""
        split = self._splits.get(name)
        return split.canary if split and split.canary and self._draw() < split.share else ""
