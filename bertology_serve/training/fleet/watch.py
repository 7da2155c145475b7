"""What a fleet tells whoever watches it; lines are those of a member's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from bertology_serve.training.methods import ParameterCount

Line = Mapping[str, Any]


class FleetWatcher(Protocol):
    """Sees the members of a fleet from outside, by name; see ``Trainer`` for what the lines hold."""

    def joined(self, name: str, step: int, total: int, parameters: ParameterCount) -> None:
        """A member begins after ``step`` of ``total`` steps."""

    def stepped(self, name: str, line: Line) -> None:
        """A member made a step."""

    def evaluated(self, name: str, line: Line) -> None:
        """A member answered its evaluation data."""

    def failed(self, name: str, reason: str) -> None:
        """A member was given up; the others go on."""

    def published(self, name: str, difference: float) -> None:
        """A member's delta stands in its place; its saved copy differs by so much."""


class Quiet:
    """Watches nothing."""

    def joined(self, name: str, step: int, total: int, parameters: ParameterCount) -> None:
        """Nothing."""

    def stepped(self, name: str, line: Line) -> None:
        """Nothing."""

    def evaluated(self, name: str, line: Line) -> None:
        """Nothing."""

    def failed(self, name: str, reason: str) -> None:
        """Nothing."""

    def published(self, name: str, difference: float) -> None:
        """Nothing."""
