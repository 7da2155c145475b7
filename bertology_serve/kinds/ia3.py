"""IA3: learnt factors on keys, values and the FFN's inner activations (Liu et al. 2022, arXiv 2205.05638).

``k = l_k ⊙ (W_k x + b_k)``, the same for v, and ``y = W (l ⊙ h) + b`` for the FFN's second linear. The factors begin
at 1 and have no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bertology_serve.errors import SpecError
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.kind import Cut, Kind, Tensors
from bertology_serve.kinds.slots import Anatomy


@dataclass(frozen=True)
class Ia3:
    """``targets`` are slots whose outputs are scaled, ``feedforward`` those whose inputs are."""

    targets: tuple[str, ...] = ("key", "value")
    feedforward: tuple[str, ...] = ("down",)

    def __post_init__(self) -> None:
        both = set(self.targets) & set(self.feedforward)
        if both or not (self.targets or self.feedforward):
            what = f"{sorted(both)[0]} in both" if both else "nothing in either"
            raise SpecError(f"ia3 has {what} of targets and feedforward; expected each slot in one of them")


def init(spec: Ia3, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}`` [L, N] of targets and [L, K] of feedforward slots, all 1, float32."""
    device = "meta" if generator is None else "cpu"
    outer = {anatomy.slot(name).name: anatomy.slot(name).outputs for name in anatomy.resolve(spec.targets)}
    inner = {anatomy.slot(name).name: anatomy.slot(name).inputs for name in anatomy.resolve(spec.feedforward)}
    return {name: torch.ones(anatomy.slot(name).depth, width, device=device) for name, width in (outer | inner).items()}


def effects(spec: Ia3, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """What is added to a factor of 1, by slot."""
    return Effects(
        scale={name: tensors[name] - 1.0 for name in anatomy.resolve(spec.targets)},
        inner={name: tensors[name] - 1.0 for name in anatomy.resolve(spec.feedforward)},
    )


def cut(spec: Ia3, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """Factors by the outputs or inputs that they are for."""
    sides = dict.fromkeys(anatomy.resolve(spec.targets), left.outputs)
    sides |= dict.fromkeys(anatomy.resolve(spec.feedforward), left.inputs)
    slots = {name: anatomy.slot(name) for name in sides}
    return {name: side(tensors[name], slots[name], slots[name].present) for name, side in sides.items()}


IA3 = Kind("ia3", Ia3, init, effects, cut)
