"""IA3: learnt factors on keys, values and the FFN's inner activations (Liu et al. 2022, arXiv 2205.05638).

``k = l_k ⊙ (W_k x + b_k)``, the same for v, and ``y = W (l ⊙ h) + b`` for the FFN's second linear. The factors begin
at 1 and have no weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bertology_serve.config_fields import named_fields
from bertology_serve.errors import FormatError, SpecError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects, Layers, spread
from bertology_serve.kinds.kinds import LATER, Cut, Kind, Tensors, check_layers, check_names, layers_of
from bertology_serve.kinds.peft_format import (
    MERGE,
    Block,
    Config,
    PeftFormat,
    modules,
    named_layers,
    path_of,
    places,
    take,
    taken,
    width,
)
from bertology_serve.kinds.slots import Anatomy


@named_fields
@dataclass(frozen=True)
class Ia3:
    """``targets`` are slots whose outputs are scaled, ``feedforward`` those whose inputs are, ``layers`` those where
    they are (``None``: all). Raises SpecError for values that make no sense.
    """

    targets: tuple[str, ...] = ("key", "value")
    feedforward: tuple[str, ...] = ("down",)
    layers: Layers = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_layers(self, self.layers)
        check_names(targets=self.targets, feedforward=self.feedforward)
        both = set(self.targets) & set(self.feedforward)
        if both or not (self.targets or self.feedforward):
            what = f"{sorted(both)[0]} in both" if both else "nothing in either"
            raise SpecError(f"ia3 has {what} of targets and feedforward; expected each slot in one of them")


def init(spec: Ia3, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}`` [L, N] of targets and [L, K] of feedforward slots, all 1, float32."""
    device = "meta" if generator is None else "cpu"
    widths = {name: anatomy.slot(name).outputs for name in anatomy.resolve(spec.targets)}
    widths |= {name: anatomy.slot(name).inputs for name in anatomy.resolve(spec.feedforward)}
    return {
        name: torch.ones(len(layers_of(spec.layers, anatomy.slot(name))), width, device=device)
        for name, width in widths.items()
    }


def effects(spec: Ia3, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """What is added to a factor of 1, by slot."""

    def stack(name: str) -> Tensor:
        slot = anatomy.slot(name)
        return spread(tensors[name] - 1.0, layers_of(spec.layers, slot), slot.depth)

    return Effects(
        scale={name: stack(name) for name in anatomy.resolve(spec.targets)},
        inner={name: stack(name) for name in anatomy.resolve(spec.feedforward)},
        layers=spec.layers,
    )


def cut(spec: Ia3, tensors: Tensors, anatomy: Anatomy, left: Cut) -> Tensors:
    """Factors by the outputs or inputs that they are for."""
    sides = dict.fromkeys(anatomy.resolve(spec.targets), left.outputs)
    sides |= dict.fromkeys(anatomy.resolve(spec.feedforward), left.inputs)
    slots = {name: anatomy.slot(name) for name in sides}
    return {name: side(tensors[name], slots[name], layers_of(spec.layers, slots[name])) for name, side in sides.items()}


LEAF = ".ia3_l"


def _modules(spec: Ia3, anatomy: Anatomy) -> tuple[dict[str, list[Block]], dict[str, Block]]:
    """The modules whose outputs are scaled, with the slots that share each, and those whose inputs are."""
    outer, inner = (
        modules(((name, layers_of(spec.layers, anatomy.slot(name))) for name in anatomy.resolve(names)), anatomy)
        for names in (spec.targets, spec.feedforward)
    )
    return outer, {path: blocks[0] for path, blocks in inner.items()}


def write(spec: Ia3, own: Mapping[str, Tensor], anatomy: Anatomy, root: str) -> Tensors:
    """Stacks ``{slot}`` as ``ia3_l`` [N, 1], 1 where no slot reaches, or [1, K] where inputs are scaled."""
    outer, inner = _modules(spec, anatomy)
    written: Tensors = {}
    for path, blocks in outer.items():
        factors = torch.ones(width(path, anatomy), 1)
        for block in blocks:
            factors[block.lo : block.hi, 0] = own[block.slot][block.index, : block.width]
        written[root + path + LEAF] = factors
    for path, block in inner.items():
        written[root + path + LEAF] = own[block.slot][block.index, None, : block.inputs]
    return written


def read(spec: Ia3, written: Tensors, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write``; takes what it reads out of ``written``."""
    outer, inner = _modules(spec, anatomy)
    stacks = init(spec, anatomy, torch.Generator())
    for path, blocks in outer.items():
        rest = take(written, root + path + LEAF, (width(path, anatomy), 1)).clone()
        for block in blocks:
            stacks[block.slot][block.index, : block.width] = rest[block.lo : block.hi, 0]
            rest[block.lo : block.hi] = 1.0
        if (rest != 1.0).any():
            raise FormatError(f"the tensor {root + path + LEAF!r} scales outputs that the delta's slots do not reach")
    for path, block in inner.items():
        stacks[block.slot][block.index, : block.inputs] = take(written, root + path + LEAF, (1, block.inputs))[0]
    return stacks


def config(spec: Ia3, anatomy: Anatomy, root: str) -> JsonObject:
    """Full names, since peft matches ends of names."""
    outer, inner = _modules(spec, anatomy)
    return {
        "target_modules": [root + path for path in (*outer, *inner)],
        "feedforward_modules": [root + path for path in inner],
    }


def load(_: Config, tensors: Tensors, anatomy: Anatomy) -> tuple[Ia3, Tensors]:
    """Spec and stacks of peft's IA3; takes its tensors out. Modules of a slot that it leaves alone have factors of 1.

    Raises Unsupported for what is no linear of a layer.
    """
    found = taken(tensors, LEAF)
    if not found:
        raise FormatError("the checkpoint holds no IA3 tensors; expected ...ia3_l")
    known, outer, inner, own = places(anatomy), set[str](), set[str](), {}
    for module, factors in found.items():
        path = path_of(module, anatomy, known)
        if path is None or factors.dim() != 2 or 1 not in factors.shape:
            raise Unsupported(f"{module[:120] + LEAF!r} is no IA3 on a linear projection of a layer; {MERGE}")
        (outer if factors.shape[1] == 1 else inner).add(known[path][0])
        own[path + LEAF] = factors
    layers = named_layers((known[path.removesuffix(LEAF)][1] for path in own), anatomy)
    targets, feedforward = (tuple(name for name in anatomy.slots if name in names) for names in (outer, inner))
    spec = Ia3(targets, feedforward, layers)
    blank = write(spec, init(spec, anatomy, torch.Generator()), anatomy, "")
    return spec, read(spec, {**blank, **own}, anatomy, "")


PEFT = PeftFormat("IA3", write, read, config, load, LEAF)
IA3 = Kind("ia3", Ia3, init, effects, cut, decays=False, peft=PEFT)
