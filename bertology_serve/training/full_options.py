"""The regularised forms of full fine-tuning and their options. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bertology_serve.errors import SpecError, nearest

MIXOUT, CHILD_TUNING, TOP_K = "mixout", "child-tuning", "top-k"
MODES = ("d", "f")


@dataclass(frozen=True)
class Mixout:
    """Mixout (Lee et al. 2019, arXiv 1909.11299): ``p`` is the share of a linear's weights put back for a step."""

    p: float = 0.7

    def __post_init__(self) -> None:
        _check_share("p", self.p, 0 <= self.p < 1 if _is_number(self.p) else False, "from 0 up to, not including, 1")


@dataclass(frozen=True)
class ChildTuning:
    """Child-Tuning (Xu et al. 2021, arXiv 2109.05687): ``share`` of the weights has a gradient.

    ``mode`` d chooses them once, by their Fisher information for the task; f draws others each step.
    """

    mode: str = "d"
    share: float = 0.3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SpecError(f"unknown mode {self.mode!r} of child-tuning; {nearest(str(self.mode), MODES)}")
        _check_share("share", self.share, 0 < self.share <= 1 if _is_number(self.share) else False, "above 0, up to 1")


@dataclass(frozen=True)
class TopK:
    """Only the upper ``layers`` layers and the head are trained."""

    layers: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise SpecError(f"layers of top-k is {self.layers!r}; expected a whole number from 1 up")


Options = Mixout | ChildTuning | TopK
REGULARISED: Mapping[str, type[Options]] = {MIXOUT: Mixout, CHILD_TUNING: ChildTuning, TOP_K: TopK}


def read_options(method: str, values: Mapping[str, Any]) -> Options:
    """The options of a regularised form from JSON or flags. Raises SpecError, naming the nearest known field."""
    form = REGULARISED[method]
    known = [field.name for field in fields(form)]
    for name in values:
        if name not in known:
            raise SpecError(f"{method} has no field {name!r}; {nearest(name, known)}")
    return form(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_share(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise SpecError(f"{name} is {value!r}; expected a number {expected}")
