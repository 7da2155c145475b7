"""LayerNorm tuning: only the weights and biases of the LayerNorms (Zhao et al. 2023, arXiv 2312.11420).

Stored as differences from the base's, so that nothing has to be known of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bertology_serve.config_fields import named_fields
from bertology_serve.errors import SpecError
from bertology_serve.kinds.effects import Effects, Layers, spread
from bertology_serve.kinds.kinds import LATER, Kind, Tensors, check_layers, layers_of, uncut, zeros
from bertology_serve.kinds.slots import ATTENTION_NORM, EMBEDDING_NORM, FFN_NORM, FINAL_NORM, Anatomy, Slot

PLACES = (EMBEDDING_NORM, ATTENTION_NORM, FFN_NORM, FINAL_NORM)


@named_fields
@dataclass(frozen=True)
class Norms:
    """``biases``: whether the norms' biases are tuned too, where they have any. ``layers`` are those whose norms are
    tuned (``None``: all, and the norms outside the layers). Raises SpecError for values that make no sense.
    """

    biases: bool = True
    layers: Layers = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_layers(self, self.layers)


def reached(spec: Norms, anatomy: Anatomy) -> list[tuple[Slot, tuple[int, ...]]]:
    """The LayerNorms that are tuned, and in which layers."""
    slots = [anatomy.slots[name] for name in PLACES if name in anatomy.slots]
    return [(slot, layers) for slot in slots if (layers := layers_of(spec.layers, slot))]


def init(spec: Norms, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}.weight`` and ``{slot}.bias`` [layers whose norm is tuned, H], zero, float32.

    Raises SpecError for an encoder that has no such norm.
    """
    tensors: Tensors = {}
    for slot, layers in reached(spec, anatomy):
        shape = (len(layers), slot.outputs)
        tensors[f"{slot.name}.weight"] = zeros(shape, generator)
        if spec.biases and slot.has_bias:
            tensors[f"{slot.name}.bias"] = zeros(shape, generator)
    if not tensors:
        raise SpecError(f"{anatomy.family} has no LayerNorm there to tune (an RMSNorm is none); take another kind")
    return tensors


def effects(spec: Norms, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """What is added to weights and biases, by slot."""

    def stacks(part: str) -> Tensors:
        return {
            slot.name: spread(tensors[f"{slot.name}.{part}"], layers, slot.depth)
            for slot, layers in reached(spec, anatomy)
            if f"{slot.name}.{part}" in tensors
        }

    return Effects(scale=stacks("weight"), bias=stacks("bias"), layers=spec.layers)


NORMS = Kind(
    "norms", Norms, init, effects, uncut, decays=False, peft="peft stores LayerNorms whole, not as differences"
)
