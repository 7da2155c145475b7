"""Prefix tuning: trained keys and values in every layer (Li and Liang 2021, arXiv 2101.00190; Liu et al. 2021,
P-tuning v2, arXiv 2110.07602). They are visible from every row, whatever the attention window, after any rotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bertology_serve.kinds.effects import Effects, PrefixEffect
from bertology_serve.kinds.kind import Cut, Kind, Tensors, check_choice, check_positive, normal
from bertology_serve.kinds.slots import KEY, Anatomy


@dataclass(frozen=True)
class Prefix:
    """``length`` is V. ``positions="shifted"`` moves the text's positions by V, as peft does.

    Keys of normed rows have entries near one, and so do those that training starts with: from N(0, 0.02²), as weights
    are drawn, 2,000 rows of SST-2 end two to three points lower.
    """

    length: int = 20
    positions: str = "kept"
    init_std: float = 1.0

    def __post_init__(self) -> None:
        check_positive(length=self.length, init_std=self.init_std)
        check_choice("positions", self.positions, ("kept", "shifted"))


def init(spec: Prefix, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``keys`` and ``values`` [L, V, H] from N(0, init_std²), float32; pruned, as wide as the widest layer."""
    slot = anatomy.slot(KEY)
    tensors = {name: normal((anatomy.layers, spec.length, slot.outputs), spec.init_std, generator)
               for name in ("keys", "values")}  # fmt: skip
    for rows in tensors.values():
        for layer in range(anatomy.layers):
            rows[layer, :, slot.outputs_of(layer) :] = 0.0  # heads that a pruned layer lacks
    return tensors


def effects(spec: Prefix, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """The keys and values of every layer."""
    return Effects(prefix=PrefixEffect(tensors["keys"], tensors["values"], spec.positions))


def cut(_: Prefix, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """Keys and values by head."""
    return {name: left.outputs(rows, anatomy.slot(KEY), range(anatomy.layers)) for name, rows in tensors.items()}


PREFIX = Kind("prefix", Prefix, init, effects, cut)
