"""What a run tells whoever watches it. Records are plain: they are the lines of ``log.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bertology_serve.training.methods import ParameterCount

Line = Mapping[str, Any]


class Callback(Protocol):
    """Sees a run from outside; see ``Trainer`` for what the lines hold."""

    def staged(self, stage: int, count: int, title: str) -> None:
        """Stage ``stage`` (from 1) of a recipe's ``count`` comes next."""
        return

    def began(self, step: int, total: int, parameters: ParameterCount) -> None:
        """Training begins after ``step`` of ``total`` steps."""
        return

    def stepped(self, line: Line) -> None:
        """A step was made."""
        return

    def evaluated(self, line: Line) -> None:
        """The evaluation data was answered."""
        return


class NoCallback(Callback):
    """Watches nothing."""


class CallbackList:
    """Tells several watchers, in their order."""

    def __init__(self, watchers: Sequence[Callback]) -> None:
        self.watchers = watchers

    def staged(self, stage: int, count: int, title: str) -> None:
        """To all."""
        for watcher in self.watchers:
            watcher.staged(stage, count, title)

    def began(self, step: int, total: int, parameters: ParameterCount) -> None:
        """To all."""
        for watcher in self.watchers:
            watcher.began(step, total, parameters)

    def stepped(self, line: Line) -> None:
        """To all."""
        for watcher in self.watchers:
            watcher.stepped(line)

    def evaluated(self, line: Line) -> None:
        """To all."""
        for watcher in self.watchers:
            watcher.evaluated(line)
