"""IA3 as peft stores it: one vector of factors a module, where in memory they are stacks by slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.ia3 import Ia3Spec
from bertology_serve.deltas.kind import Tensors
from bertology_serve.deltas.modules import MERGE, take, width
from bertology_serve.deltas.slots import LINEAR_SLOTS, Anatomy
from bertology_serve.errors import FormatError, Unsupported

LEAF = ".ia3_l"


def paths(spec: Ia3Spec, anatomy: Anatomy) -> tuple[dict[str, list[tuple[str, int]]], dict[str, tuple[str, int]]]:
    """The modules whose outputs are scaled, with the slots that share each, and those whose inputs are."""
    outer: dict[str, list[tuple[str, int]]] = {}
    for name in anatomy.resolve(spec.targets):
        for layer in anatomy.slot(name).present:
            outer.setdefault(str(anatomy.slot(name).paths[layer]), []).append((name, layer))
    inner = {
        str(anatomy.slot(name).paths[layer]): (name, layer)
        for name in anatomy.resolve(spec.feedforward)
        for layer in anatomy.slot(name).present
    }
    return outer, inner


def write_ia3(own: Mapping[str, Tensor], spec: Ia3Spec, anatomy: Anatomy, root: str) -> Tensors:
    """Stacks ``{slot}`` as ``ia3_l`` [N, 1], 1 where no slot reaches, or [1, K] where inputs are scaled."""
    outer, inner = paths(spec, anatomy)
    written: Tensors = {}
    for path, owners in outer.items():
        factors = torch.ones(width(path, anatomy), 1)
        for name, layer in owners:
            factors[_columns(anatomy, name, layer), 0] = own[name][layer, : anatomy.slot(name).outputs_of(layer)]
        written[root + path + LEAF] = factors
    for path, (name, layer) in inner.items():
        written[root + path + LEAF] = own[name][layer, None, : anatomy.slot(name).inputs_of(layer)]
    return written


def read_ia3(written: Tensors, spec: Ia3Spec, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write_ia3``; takes what it reads out of ``written``."""
    outer, inner = paths(spec, anatomy)
    widths = {name: anatomy.slot(name).outputs for name in anatomy.resolve(spec.targets)}
    widths |= {name: anatomy.slot(name).inputs for name in anatomy.resolve(spec.feedforward)}
    stacks = {name: torch.ones(anatomy.slot(name).depth, wide) for name, wide in widths.items()}
    for path, owners in outer.items():
        rest = take(written, root + path + LEAF, (width(path, anatomy), 1)).clone()
        for name, layer in owners:
            columns = _columns(anatomy, name, layer)
            stacks[name][layer, : anatomy.slot(name).outputs_of(layer)] = rest[columns, 0]
            rest[columns] = 1.0
        if (rest != 1.0).any():
            raise FormatError(f"the tensor {root + path + LEAF!r} scales outputs that the delta's slots do not reach")
    for path, (name, layer) in inner.items():
        count = anatomy.slot(name).inputs_of(layer)
        stacks[name][layer, :count] = take(written, root + path + LEAF, (1, count))[0]
    return stacks


def ia3_delta(tensors: Tensors, anatomy: Anatomy, prefix: str) -> tuple[Ia3Spec, Tensors]:
    """Spec and stacks of peft's IA3; takes its tensors out. Modules of a slot that it leaves alone have factors of 1.

    ``prefix`` is what module names begin with. Raises Unsupported for what is no linear of a layer.
    """
    found = {name: tensors.pop(name) for name in list(tensors) if name.endswith(LEAF)}
    if not found:
        raise FormatError("the checkpoint holds no IA3 tensors; expected ...ia3_l")
    slots = [slot for slot in anatomy.slots.values() if slot.name in LINEAR_SLOTS and slot.part is None]
    places = {path: slot for slot in slots for path in slot.paths if path is not None}
    outer, inner, own = set[str](), set[str](), {}
    for name, factors in found.items():
        module = name.removeprefix(prefix).removesuffix(LEAF)
        path = next((p for p in (module, module.removeprefix(f"{anatomy.prefix}.")) if p in places), None)
        if path is None or factors.dim() != 2 or 1 not in factors.shape:
            raise Unsupported(f"{name[:120]!r} is no IA3 on a linear projection of a layer; {MERGE}")
        (outer if factors.shape[1] == 1 else inner).add(places[path].name)
        own[path + LEAF] = factors
    spec = Ia3Spec(*(tuple(name for name in anatomy.slots if name in names) for names in (outer, inner)))
    blank = write_ia3(_ones(spec, anatomy), spec, anatomy, "")
    return spec, {f"ia3.{name}": stack for name, stack in read_ia3({**blank, **own}, spec, anatomy, "").items()}


def ia3_config(spec: Ia3Spec, anatomy: Anatomy, root: str) -> dict[str, Any]:
    """The method's part of ``adapter_config.json``: full names, since peft matches ends of names."""
    outer, inner = paths(spec, anatomy)
    return {
        "peft_type": "IA3",
        "target_modules": [root + path for path in (*outer, *inner)],
        "feedforward_modules": [root + path for path in inner],
    }


def _columns(anatomy: Anatomy, name: str, layer: int) -> slice:
    slot = anatomy.slot(name)
    return slice(*(slot.part or (0, slot.outputs_of(layer))))


def _ones(spec: Ia3Spec, anatomy: Anatomy) -> Tensors:
    widths = {name: anatomy.slot(name).outputs for name in spec.targets}
    widths |= {name: anatomy.slot(name).inputs for name in spec.feedforward}
    return {name: torch.ones(anatomy.slot(name).depth, wide) for name, wide in widths.items()}
