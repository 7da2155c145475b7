"""BitFit: only the biases are tuned (Ben Zaken et al. 2021, arXiv 2106.10199).

Stored as differences from the base biases, so that weight decay pulls towards the pretrained model and an encoder
without biases (ModernBERT) simply gets them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bertology_serve.kinds.effects import Effects, spread
from bertology_serve.kinds.kind import Cut, Kind, Tensors, check_choice, zeros
from bertology_serve.kinds.slots import LINEAR_SLOTS, QKV, UP_GATE, Anatomy, Slot


@dataclass(frozen=True)
class Bitfit:
    """``biases``: ``all`` (every linear, LayerNorm and the embeddings) or ``attention`` (query, key, value only)."""

    biases: str = "all"

    def __post_init__(self) -> None:
        check_choice("biases", self.biases, ("all", "attention"))


def slots(spec: Bitfit, anatomy: Anatomy) -> list[Slot]:
    """The slots whose bias is tuned. An encoder without any bias gets them at every slot of its layers."""
    if spec.biases == "attention":
        return [anatomy.slot(name) for name in ("query", "key", "value")]
    whole = {QKV, UP_GATE}  # their slices, or the unpacked projections, are slots of their own
    candidates = [slot for slot in anatomy.slots.values() if slot.name not in whole]
    with_bias = [slot for slot in candidates if slot.has_bias]
    return with_bias or [slot for slot in candidates if slot.name in LINEAR_SLOTS]


def init(spec: Bitfit, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}`` [layers that have the module, N], zero, float32."""
    return {slot.name: zeros((len(slot.present), slot.outputs), generator) for slot in slots(spec, anatomy)}


def effects(spec: Bitfit, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """One bias difference a slot."""
    return Effects(
        bias={slot.name: spread(tensors[slot.name], slot.present, slot.depth) for slot in slots(spec, anatomy)}
    )


def cut(spec: Bitfit, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """Biases by their outputs."""
    return {slot.name: left.outputs(tensors[slot.name], slot, slot.present) for slot in slots(spec, anatomy)}


BITFIT = Kind("bitfit", Bitfit, init, effects, cut)
