"""Where a run stands, beside its tensors: plain numbers that JSON holds exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """``stage`` counts a recipe's stages from 1, and is 0 where there is but one. ``epoch`` and ``offset`` are the
    sampler's place; ``best`` is the highest dev metric and, where several steps reached it, the highest negative loss
    among them; ``best_step`` got there.

    ``metrics`` are those of the state that is kept, ``stale`` counts evaluations since ``best_step``, ``stopped`` says
    that patience ran out, ``seconds`` is the time spent so far.
    """

    stage: int = 0
    step: int = 0
    epoch: int = 0
    offset: int = 0
    best: list[float] = field(default_factory=list)
    best_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """The inverse of ``as_dict``."""
        return cls(**values)
