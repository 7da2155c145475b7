"""BitFit: only the biases are tuned (Ben Zaken et al. 2021, arXiv 2106.10199).

Stored as differences from the base biases, so that weight decay pulls towards the pretrained model and an encoder
without biases (ModernBERT) simply gets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bertology_serve.config_fields import check_known, named_fields
from bertology_serve.errors import Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects, Layers, spread
from bertology_serve.kinds.kinds import LATER, Cut, Kind, Tensors, check_layers, layers_of, zeros
from bertology_serve.kinds.peft_format import (
    Block,
    Config,
    PeftFormat,
    check_rest,
    modules,
    named_layers,
    padded,
    path_of,
    places,
    take,
    taken,
    targets,
    unknown,
    width,
)
from bertology_serve.kinds.slots import LINEAR_SLOTS, QKV, UP_GATE, Anatomy, Slot


@named_fields
@dataclass(frozen=True)
class Bitfit:
    """``biases``: ``all`` (every linear, LayerNorm and the embeddings) or ``attention`` (query, key, value only).
    ``layers`` are those whose biases are tuned (``None``: all, and the embeddings). Raises SpecError for values that
    make no sense.
    """

    biases: str = "all"
    layers: Layers = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_known("biases", self.biases, ("all", "attention"))
        check_layers(self, self.layers)


def reached(spec: Bitfit, anatomy: Anatomy) -> list[tuple[Slot, tuple[int, ...]]]:
    """The slots whose bias is tuned, and in which layers: every linear slot's of an encoder without any bias."""
    whole = {QKV, UP_GATE}  # their slices, or the unpacked projections, are slots of their own
    slots = [slot for slot in anatomy.slots.values() if slot.name not in whole]
    slots = [slot for slot in slots if slot.has_bias] or [slot for slot in slots if slot.name in LINEAR_SLOTS]
    if spec.biases == "attention":
        slots = [anatomy.slot(name) for name in ("query", "key", "value")]
    return [(slot, layers) for slot in slots if (layers := layers_of(spec.layers, slot))]


def init(spec: Bitfit, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}`` [layers whose bias is tuned, N], zero, float32."""
    return {slot.name: zeros((len(layers), slot.outputs), generator) for slot, layers in reached(spec, anatomy)}


def effects(spec: Bitfit, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """One bias difference a slot."""
    found = reached(spec, anatomy)
    biases = {slot.name: spread(tensors[slot.name], layers, slot.depth) for slot, layers in found}
    return Effects(bias=biases, layers=spec.layers)


def cut(spec: Bitfit, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """Biases by their outputs."""
    return {slot.name: left.outputs(tensors[slot.name], slot, layers) for slot, layers in reached(spec, anatomy)}


def _modules(spec: Bitfit, anatomy: Anatomy) -> dict[str, list[Block]]:
    return modules(((slot.name, layers) for slot, layers in reached(spec, anatomy)), anatomy)


def write(spec: Bitfit, own: Mapping[str, Tensor], anatomy: Anatomy, root: str) -> Tensors:
    """Stacks ``{slot}`` [L, N] as ``beft_bias`` [1, N] a module."""
    written: Tensors = {}
    for path, blocks in _modules(spec, anatomy).items():
        bias = own[blocks[0].slot].new_zeros(1, width(path, anatomy))
        for block in blocks:
            bias[0, block.lo : block.hi] = own[block.slot][block.index, : block.width]
        written[root + path + LEAF] = bias
    return written


def read(spec: Bitfit, written: Tensors, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write``; takes what it reads out of ``written``."""
    stacks: dict[str, list[Tensor]] = {}
    for path, blocks in _modules(spec, anatomy).items():
        bias = take(written, root + path + LEAF, (1, width(path, anatomy)))
        rest = bias.clone()
        for block in blocks:
            wide = anatomy.slot(block.slot).outputs
            stacks.setdefault(block.slot, []).append(padded(bias[0, block.lo : block.hi], wide))
            rest[0, block.lo : block.hi] = 0
        check_rest(rest, root + path + LEAF)
    return {name: torch.stack(parts) for name, parts in stacks.items()}


def config(spec: Bitfit, anatomy: Anatomy, root: str) -> JsonObject:
    """The modules alone."""
    return {"target_modules": targets(_modules(spec, anatomy), anatomy, root)}


def load(_: Config, tensors: Tensors, anatomy: Anatomy) -> tuple[Bitfit, Tensors]:
    """Spec and stacks of a BEFT checkpoint; biases that it leaves alone are zero."""
    known, found = places(anatomy), {}
    for module, bias in taken(tensors, LEAF).items():
        path = path_of(module, anatomy, known)
        if path is None:
            raise unknown(module, anatomy)
        found[path + LEAF] = bias
    attention = Bitfit("attention")
    near = {path + LEAF for path in _modules(attention, anatomy)}
    layers = named_layers((known[path.removesuffix(LEAF)][1] for path in found), anatomy)
    spec = replace(attention if found.keys() <= near else Bitfit("all"), layers=layers)
    written = {path + LEAF: torch.zeros(1, width(path, anatomy)) for path in _modules(spec, anatomy)}
    beyond = sorted(found.keys() - written.keys())
    if beyond or not found:
        raise Unsupported(f"BEFT on {beyond[0] if beyond else 'no module'} is not read here; biases of linears are")
    return spec, read(spec, written | found, anatomy, "")


def obstacle(spec: Bitfit, anatomy: Anatomy) -> str:
    """Every bias must belong to a linear projection."""
    linear = all(slot.name in LINEAR_SLOTS for slot, _ in reached(spec, anatomy))
    return "" if linear else "peft changes the biases of linear projections only (BEFT)"


LEAF = ".beft_bias"
PEFT = PeftFormat("BEFT", write, read, config, load, LEAF, obstacle=obstacle)
BITFIT = Kind("bitfit", Bitfit, init, effects, cut, decays=False, peft=PEFT)
