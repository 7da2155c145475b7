"""LayerNorm tuning: only the weights and biases of the LayerNorms (Zhao et al. 2023, arXiv 2312.11420).

Stored as differences from the base's, so that nothing has to be known of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bertology_serve.kinds.effects import Effects, spread
from bertology_serve.kinds.kinds import Kind, Tensors, uncut, zeros
from bertology_serve.kinds.slots import ATTENTION_NORM, EMBEDDING_NORM, FFN_NORM, FINAL_NORM, Anatomy, Slot

PLACES = (EMBEDDING_NORM, ATTENTION_NORM, FFN_NORM, FINAL_NORM)


@dataclass(frozen=True)
class Norms:
    """``biases``: whether the norms' biases are tuned too, where they have any."""

    biases: bool = True


def slots(anatomy: Anatomy) -> list[Slot]:
    """The LayerNorms of an encoder."""
    return [anatomy.slots[name] for name in PLACES if name in anatomy.slots]


def init(spec: Norms, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}.weight`` and ``{slot}.bias`` [layers that have the norm, H], zero, float32."""
    tensors: Tensors = {}
    for slot in slots(anatomy):
        shape = (len(slot.present), slot.outputs)
        tensors[f"{slot.name}.weight"] = zeros(shape, generator)
        if spec.biases and slot.has_bias:
            tensors[f"{slot.name}.bias"] = zeros(shape, generator)
    return tensors


def effects(spec: Norms, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """What is added to weights and biases, by slot."""

    def stack(slot: Slot, part: str) -> torch.Tensor:
        return spread(tensors[f"{slot.name}.{part}"], slot.present, slot.depth)

    found = slots(anatomy)
    return Effects(
        scale={slot.name: stack(slot, "weight") for slot in found},
        bias={slot.name: stack(slot, "bias") for slot in found if f"{slot.name}.bias" in tensors},
    )


NORMS = Kind(
    "norms", Norms, init, effects, uncut, decays=False, peft="peft stores LayerNorms whole, not as differences"
)
