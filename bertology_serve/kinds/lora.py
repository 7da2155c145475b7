"""LoRA: low-rank updates of linear projections (Hu et al. 2021, arXiv 2106.09685).

``y = W x + b + scale · B A dropout(x)`` with ``scale = alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bertology_serve.kinds.effects import Effects, LowRank, spread
from bertology_serve.kinds.kind import (
    Cut,
    Kind,
    Tensors,
    check_choice,
    check_positive,
    check_share,
    chosen_layers,
    zeros,
)
from bertology_serve.kinds.slots import Anatomy


@dataclass(frozen=True)
class Lora:
    """``targets`` are slot names, ``layers`` layer indices from 0 (``None``: all), ``init`` draws A; B starts at zero.

    ``init="kaiming"`` is the official code's uniform distribution of standard deviation ``1/sqrt(3 K)``;
    ``"gaussian"`` is N(0, 1/rank²), as peft does.
    """

    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, alpha=self.alpha)
        check_share(dropout=self.dropout)
        check_choice("init", self.init, ("kaiming", "gaussian"))

    @property
    def scale(self) -> float:
        """The factor of ``B A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init(spec: Lora, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}.a`` [L, R, K] drawn as ``spec.init`` says and ``{slot}.b`` [L, R, N] zero, float32."""
    tensors: Tensors = {}
    for name in anatomy.resolve(spec.targets):
        slot = anatomy.slot(name)
        depth = len(chosen_layers(spec.layers, slot.depth))
        a = zeros((depth, spec.rank, slot.inputs), generator)
        if generator is not None and spec.init == "gaussian":
            a.normal_(0.0, 1.0 / spec.rank, generator=generator)
        elif generator is not None:
            bound = 1.0 / math.sqrt(slot.inputs)
            a.uniform_(-bound, bound, generator=generator)
        for index, layer in enumerate(chosen_layers(spec.layers, slot.depth)):
            a[index, :, slot.inputs_of(layer) :] = 0.0  # columns that a narrower layer lacks
        tensors[f"{name}.a"] = a
        tensors[f"{name}.b"] = zeros((depth, spec.rank, slot.outputs), generator)
    return tensors


def effects(spec: Lora, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """One low-rank update a target slot, the scale folded into B."""
    updates = {}
    for name in anatomy.resolve(spec.targets):
        depth = anatomy.slot(name).depth
        layers = chosen_layers(spec.layers, depth)
        a, b = tensors[f"{name}.a"], tensors[f"{name}.b"] * spec.scale
        updates[name] = LowRank(spread(a, layers, depth), spread(b, layers, depth), spec.dropout, spec.layers)
    return Effects(low_rank=updates)


def cut(spec: Lora, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """A by its inputs, B by its outputs."""
    found: Tensors = {}
    for name in anatomy.resolve(spec.targets):
        slot = anatomy.slot(name)
        layers = chosen_layers(spec.layers, slot.depth)
        found[f"{name}.a"] = left.inputs(tensors[f"{name}.a"], slot, layers)
        found[f"{name}.b"] = left.outputs(tensors[f"{name}.b"], slot, layers)
    return found


LORA = Kind("lora", Lora, init, effects, cut)
