"""peft's LoRA and BEFT tensors, one module at a time, as stacks by slot."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bertology_serve.deltas.bitfit import BitfitSpec
from bertology_serve.deltas.kind import Tensors
from bertology_serve.deltas.layout import MODEL_ROOT
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.deltas.modules import MERGE, modules, read_beft, width
from bertology_serve.deltas.slots import LINEAR_SLOTS, Anatomy
from bertology_serve.deltas.typed import conform
from bertology_serve.errors import FormatError, Unsupported

# Few repetitions, few groups and none that repeats: a hostile pattern cannot take exponential time.
_PATTERN = re.compile(r"\^?(?:[\w.*+\\$|\[\]-]|\((?:\?:)?|\)(?![*+?{]))+")


@dataclass(frozen=True)
class Pair:
    """One module's LoRA: ``a`` [r, K], ``b`` [N, r], and the factor of their product."""

    a: Tensor
    b: Tensor
    alpha: float
    scale: float


def lora_delta(config: Mapping[str, Any], tensors: Tensors, anatomy: Anatomy) -> tuple[LoraSpec, Tensors]:
    """Spec and stacks of a LoRA checkpoint; takes its tensors out of ``tensors``.

    Modules of lower rank than the highest get zero rows; where scales differ they are folded into B.
    """
    places, pairs = _places(anatomy), {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(MODEL_ROOT).removesuffix(".lora_A.weight")
        slot, layer = places[_path(module, anatomy, places)]
        pairs[slot, layer] = _pair(module, name, tensors, config, anatomy.slot(slot).inputs, anatomy.slot(slot).outputs)
    odd = next((name for name in tensors if ".lora_" in name), None)
    if odd is not None:
        raise Unsupported(f"the tensor {odd[:120]!r} is no plain LoRA of a linear projection; {MERGE}")
    if not pairs:
        raise FormatError("the checkpoint holds no LoRA tensors; expected ...lora_A.weight and ...lora_B.weight")
    spec = _spec(config, pairs, anatomy)
    return spec, _stacks(spec, pairs, anatomy)


def beft_delta(tensors: Tensors, anatomy: Anatomy) -> tuple[BitfitSpec, Tensors]:
    """Spec and stacks of a BEFT checkpoint; biases that it leaves alone are zero."""
    places, found = _places(anatomy), {}
    for name in [name for name in tensors if name.endswith(".beft_bias")]:
        path = _path(name.removeprefix(MODEL_ROOT).removesuffix(".beft_bias"), anatomy, places)
        found[f"{path}.beft_bias"] = tensors.pop(name)
    attention = BitfitSpec("attention")
    near = {f"{path}.beft_bias" for path in modules(attention, anatomy)}
    spec = attention if found.keys() <= near else BitfitSpec("all")
    written = {f"{path}.beft_bias": torch.zeros(1, width(path, anatomy)) for path in modules(spec, anatomy)}
    beyond = sorted(found.keys() - written.keys())
    if beyond or not found:
        raise Unsupported(f"BEFT on {beyond[0] if beyond else 'no module'} is not read here; biases of linears are")
    return spec, {f"bitfit.{name}": bias for name, bias in read_beft(written | found, spec, anatomy, "").items()}


def _places(anatomy: Anatomy) -> dict[str, tuple[str, int]]:
    """Slot and layer of every whole linear module, by path."""
    whole = [slot for slot in anatomy.slots.values() if slot.name in LINEAR_SLOTS and slot.part is None]
    return {path: (slot.name, layer) for slot in whole for layer, path in enumerate(slot.paths) if path is not None}


def _path(module: str, anatomy: Anatomy, places: Mapping[str, Any]) -> str:
    """A module's path in the headless encoder."""
    for path in (module, module.removeprefix(f"{anatomy.prefix}.")):
        if path in places:
            return path
    raise Unsupported(f"{module[:120]!r} is no linear projection of a layer of {anatomy.family}; {MERGE}")


def _pair(module: str, name: str, tensors: Tensors, config: Mapping[str, Any], inputs: int, outputs: int) -> Pair:
    a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
    rank = len(a) if a.dim() == 2 else 0
    if b is None or not rank or tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
        shapes = f"{list(a.shape)} and {None if b is None else list(b.shape)}"
        raise FormatError(f"{module}: lora_A and lora_B are {shapes}; expected [r, {inputs}] and [{outputs}, r]")
    alpha = conform(_alpha(module, config), float, "lora_alpha")
    return Pair(a, b, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(module: str, config: Mapping[str, Any]) -> Any:
    """The module's alpha: the first pattern that matches the end of its name, as peft looks it up."""
    patterns = config.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items() if isinstance(patterns, Mapping) else ():
        many = len(re.findall("[*+]", pattern)) > 2 or pattern.count("(") > 2
        if len(pattern) > 200 or many or not _PATTERN.fullmatch(pattern):
            raise Unsupported(f"alpha_pattern {pattern[:60]!r} is not read here; use module names without repetition")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        except re.error as error:
            raise FormatError(f"alpha_pattern {pattern[:60]!r} is no pattern: {error}") from None
    return config.get("lora_alpha", 8)


def _spec(config: Mapping[str, Any], pairs: Mapping[tuple[str, int], Pair], anatomy: Anatomy) -> LoraSpec:
    ranks, alphas = {len(pair.a) for pair in pairs.values()}, {pair.alpha for pair in pairs.values()}
    layers = tuple(sorted({layer for _, layer in pairs}))
    rank, alpha = max(ranks), next(iter(alphas))
    alike = len(ranks) == len(alphas) == 1 and alpha > 0
    return LoraSpec(
        targets=tuple(name for name in anatomy.linear_slots if any(slot == name for slot, _ in pairs)),
        rank=rank,
        alpha=alpha if alike else float(rank),
        dropout=conform(config.get("lora_dropout") or 0.0, float, "lora_dropout"),
        rslora=alike and bool(config.get("use_rslora")),
        layers=None if layers == tuple(range(anatomy.layers)) else layers,
    )


def _stacks(spec: LoraSpec, pairs: Mapping[tuple[str, int], Pair], anatomy: Anatomy) -> Tensors:
    layers = spec.layers or tuple(range(anatomy.layers))
    stacks: Tensors = {}
    for name in spec.targets:
        slot = anatomy.slot(name)
        none = Pair(torch.zeros(0, slot.inputs), torch.zeros(slot.outputs, 0), 1.0, 1.0)
        chosen = [pairs.get((name, layer), none) for layer in layers]
        stacks[f"lora.{name}.a"] = torch.stack([_rows(pair.a, spec.rank) for pair in chosen])
        stacks[f"lora.{name}.b"] = torch.stack([_rows(_scaled(pair, spec).T, spec.rank) for pair in chosen])
    return stacks


def _scaled(pair: Pair, spec: LoraSpec) -> Tensor:
    """B for the spec's scale; untouched where the module's is the same."""
    return pair.b if pair.scale == spec.scale else pair.b * (pair.scale / spec.scale)


def _rows(tensor: Tensor, rank: int) -> Tensor:
    return pad(tensor, (0, 0, 0, rank - len(tensor)))
