"""LoRA, BitFit and IA3 as peft stores them: tensors by module, where in memory they are stacks by slot.

Slots that are slices of one packed module (query and value of ModernBERT's Wqkv) share the module's tensors: the A
blocks stand one above the other, B is block-diagonal with zero rows where no slot reaches, so r' = n R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.bitfit import slots as bitfit_slots
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.kind import Tensors, chosen_layers
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.slots import LINEAR_SLOTS, Anatomy

MERGE = "merge it with peft (merge_and_unload), save the whole model, and convert that directory"


@dataclass(frozen=True)
class Block:
    """One slot's share of a module: rows ``lo`` to ``hi`` of its output, at ``index`` of the slot's stack.

    In a pruned encoder the stack may be wider than the module, whose inputs are ``inputs``.
    """

    slot: str
    index: int
    lo: int
    hi: int
    inputs: int

    @property
    def width(self) -> int:
        """N of the slot in this layer."""
        return self.hi - self.lo


def modules(spec: Lora | Bitfit, anatomy: Anatomy) -> dict[str, list[Block]]:
    """The modules that a LoRA or BitFit spec changes, by path, with the slots that share each."""
    found: dict[str, list[Block]] = {}
    for name, layers in _reached(spec, anatomy):
        slot = anatomy.slot(name)
        for index, layer in enumerate(layers):
            lo, hi = slot.part or (0, slot.outputs_of(layer))
            path = slot.paths[layer]
            if path is None:
                raise Unsupported(f"layer {layer} of {anatomy.family} has no {name}; choose other layers or targets")
            found.setdefault(path, []).append(Block(name, index, lo, hi, slot.inputs_of(layer)))
    return found


def is_beft(spec: Bitfit, anatomy: Anatomy) -> bool:
    """Whether every bias of a BitFit spec belongs to a linear projection, which is all that peft's BEFT can change."""
    return all(slot.name in LINEAR_SLOTS for slot in bitfit_slots(spec, anatomy))


def take(written: Tensors, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Removes and returns a tensor; FormatError when it is missing or of another shape."""
    if name not in written:
        raise FormatError(f"the tensor {name!r} is missing; expected {list(shape) if shape else 'it'}")
    found = written.pop(name)
    if shape is not None and tuple(found.shape) != shape:
        raise FormatError(f"the tensor {name!r} has shape {list(found.shape)}; expected {list(shape)}")
    return found


def width(path: str, anatomy: Anatomy) -> int:
    """The number of outputs of the whole module at a path, of which a slot may be a slice."""
    found = [slot for slot in anatomy.slots.values() if path in slot.paths]
    return max((slot.part or (0, slot.outputs_of(slot.paths.index(path))))[1] for slot in found)


def _reached(spec: Lora | Bitfit, anatomy: Anatomy) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Slot names with the layers of their stacks."""
    if isinstance(spec, Lora):
        for name in anatomy.resolve(spec.targets):
            yield name, chosen_layers(spec.layers, anatomy.slot(name).depth)
    else:
        for slot in bitfit_slots(spec, anatomy):
            yield slot.name, slot.present


def write_lora(own: Mapping[str, Tensor], spec: Lora, anatomy: Anatomy, root: str) -> Tensors:
    """Stacks ``{slot}.a`` [L, R, K] and ``.b`` [L, R, N] as ``lora_A`` [n R, K] and ``lora_B`` [N, n R] a module."""
    written: Tensors = {}
    for path, blocks in modules(spec, anatomy).items():
        b = own[f"{blocks[0].slot}.b"].new_zeros(width(path, anatomy), spec.rank * len(blocks))
        for i, block in enumerate(blocks):
            b[block.lo : block.hi, i * spec.rank : (i + 1) * spec.rank] = own[f"{block.slot}.b"][
                block.index, :, : block.width
            ].T
        written[f"{root}{path}.lora_A.weight"] = torch.cat([own[f"{x.slot}.a"][x.index, :, : x.inputs] for x in blocks])
        written[f"{root}{path}.lora_B.weight"] = b
    return written


def read_lora(written: Tensors, spec: Lora, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write_lora``; takes what it reads out of ``written``."""
    stacks: dict[str, list[Tensor]] = {}
    for path, blocks in modules(spec, anatomy).items():
        ranks = spec.rank * len(blocks)
        a = take(written, f"{root}{path}.lora_A.weight", (ranks, blocks[0].inputs))
        b = take(written, f"{root}{path}.lora_B.weight", (width(path, anatomy), ranks))
        rest = b.clone()
        for i, block in enumerate(blocks):
            mine = slice(i * spec.rank, (i + 1) * spec.rank)
            slot = anatomy.slot(block.slot)
            stacks.setdefault(f"{block.slot}.a", []).append(_padded(a[mine], slot.inputs))
            stacks.setdefault(f"{block.slot}.b", []).append(_padded(b[block.lo : block.hi, mine].T, slot.outputs))
            rest[block.lo : block.hi, mine] = 0
        _check_rest(rest, f"{root}{path}.lora_B.weight")
    return {name: torch.stack(parts).contiguous() for name, parts in stacks.items()}


def write_beft(own: Mapping[str, Tensor], spec: Bitfit, anatomy: Anatomy, root: str) -> Tensors:
    """Stacks ``{slot}`` [L, N] as ``beft_bias`` [1, N] a module."""
    written: Tensors = {}
    for path, blocks in modules(spec, anatomy).items():
        bias = own[blocks[0].slot].new_zeros(1, width(path, anatomy))
        for block in blocks:
            bias[0, block.lo : block.hi] = own[block.slot][block.index, : block.width]
        written[f"{root}{path}.beft_bias"] = bias
    return written


def read_beft(written: Tensors, spec: Bitfit, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write_beft``; takes what it reads out of ``written``."""
    stacks: dict[str, list[Tensor]] = {}
    for path, blocks in modules(spec, anatomy).items():
        bias = take(written, f"{root}{path}.beft_bias", (1, width(path, anatomy)))
        rest = bias.clone()
        for block in blocks:
            stacks.setdefault(block.slot, []).append(
                _padded(bias[0, block.lo : block.hi], anatomy.slot(block.slot).outputs)
            )
            rest[0, block.lo : block.hi] = 0
        _check_rest(rest, f"{root}{path}.beft_bias")
    return {name: torch.stack(parts) for name, parts in stacks.items()}


def _padded(rows: Tensor, width: int) -> Tensor:
    """Zeros behind the columns, up to the stack's width."""
    return F.pad(rows, (0, width - rows.shape[-1])) if rows.shape[-1] < width else rows


def _check_rest(rest: Tensor, name: str) -> None:
    if rest.any():
        raise FormatError(f"the tensor {name!r} changes outputs that the delta's slots do not reach; save it again")


LEAF = ".ia3_l"


def paths(spec: Ia3, anatomy: Anatomy) -> tuple[dict[str, list[tuple[str, int]]], dict[str, tuple[str, int]]]:
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


def write_ia3(own: Mapping[str, Tensor], spec: Ia3, anatomy: Anatomy, root: str) -> Tensors:
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


def read_ia3(written: Tensors, spec: Ia3, anatomy: Anatomy, root: str) -> Tensors:
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


def ia3_delta(tensors: Tensors, anatomy: Anatomy, prefix: str) -> tuple[Ia3, Tensors]:
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
    spec = Ia3(*(tuple(name for name in anatomy.slots if name in names) for names in (outer, inner)))
    blank = write_ia3(_ones(spec, anatomy), spec, anatomy, "")
    return spec, {f"ia3.{name}": stack for name, stack in read_ia3({**blank, **own}, spec, anatomy, "").items()}


def ia3_config(spec: Ia3, anatomy: Anatomy, root: str) -> JsonObject:
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


def _ones(spec: Ia3, anatomy: Anatomy) -> Tensors:
    widths = {name: anatomy.slot(name).outputs for name in spec.targets}
    widths |= {name: anatomy.slot(name).inputs for name in spec.feedforward}
    return {name: torch.ones(anatomy.slot(name).depth, wide) for name, wide in widths.items()}
