"""peft's LoRA and BEFT tensors, one module at a time, as stacks by slot."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bertology_serve.deltas.interop.peft_tensors import MERGE, modules, read_beft, width
from bertology_serve.deltas.layout import MODEL_ROOT
from bertology_serve.deltas.safe_io import conform
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.kind import Tensors
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.slots import LINEAR_SLOTS, Anatomy
from bertology_serve.tasks.heads import Dense

# Few repetitions, few groups and none that repeats: a hostile pattern cannot take exponential time.
_PATTERN = re.compile(r"\^?(?:[\w.*+\\$|\[\]-]|\((?:\?:)?|\)(?![*+?{]))+")
_TARGETS = re.compile(
    r"(?:[\w.*+\\$^|-]|\[[\w-]+\]|\((?:\?:)?[\w|.\\-]+\))+"
)  # no repeated groups, for the same reason


@dataclass(frozen=True)
class Pair:
    """One module's LoRA: ``a`` [r, K], ``b`` [N, r], and the factor of their product."""

    a: Tensor
    b: Tensor
    alpha: float
    scale: float


def lora_delta(config: JsonObject, tensors: Tensors, anatomy: Anatomy) -> tuple[Lora, Tensors]:
    """Spec and stacks of a LoRA checkpoint; takes the tensors of the encoder's modules out of ``tensors``.

    What is left may be the head's (``merge_head``, ``check_none_left``). Modules of lower rank than the highest get
    zero rows; where scales differ they are folded into B.
    """
    places, pairs = _places(anatomy), {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(MODEL_ROOT).removesuffix(".lora_A.weight")
        path = _path(module, anatomy, places)
        if path is None:
            continue
        slot, layer = places[path]
        pairs[slot, layer] = _pair(module, name, tensors, config, anatomy.slot(slot).inputs, anatomy.slot(slot).outputs)
    if not pairs:
        check_none_left(tensors, anatomy)
        raise FormatError("the checkpoint holds no LoRA tensors; expected ...lora_A.weight and ...lora_B.weight")
    spec = _spec(config, pairs, anatomy)
    return spec, _stacks(spec, pairs, anatomy)


def merge_head(config: JsonObject, head: Tensors, form: Sequence[Dense], base_head: Mapping[str, Tensor]) -> None:
    """Merges the LoRA of a head's own layers (the pooler, which ``all-linear`` reaches) into weights of the delta.

    ``base_head`` is what the base checkpoint has of a head. Raises FormatError where nobody has the weight, or where
    the file lacks the tensors of a layer that ``target_modules`` name.
    """
    for dense in form:
        name, weight = f"{dense.path}.lora_A.weight", f"{dense.path}.weight"
        if name not in head:
            if weight not in head and _is_targeted(config, dense.path, None):
                raise FormatError(_lacking(dense.path, 1))
            continue
        pair = _pair(dense.path, name, head, config, dense.inputs, dense.outputs)
        for leaf in ("weight", "bias"):
            if f"{dense.path}.{leaf}" not in head and f"{dense.base_name}.{leaf}" in base_head:
                head[f"{dense.path}.{leaf}"] = base_head[f"{dense.base_name}.{leaf}"]
        if weight not in head:
            raise FormatError(
                f"{dense.path} has LoRA, but neither the adapter nor the base has its weight; train it again with "
                f"{dense.path!r} among modules_to_save or exclude_modules"
            )
        head[weight] = head[weight] + pair.scale * (pair.b @ pair.a)


def check_none_left(tensors: Mapping[str, Tensor], anatomy: Anatomy) -> None:
    """Raises Unsupported for a LoRA tensor that belongs neither to a layer nor to the head."""
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(MODEL_ROOT).removesuffix(".lora_A.weight")
            raise _unknown(module, anatomy)
        if ".lora_" in name:
            raise Unsupported(f"the tensor {name[:120]!r} is no plain LoRA of a linear projection; {MERGE}")


def check_whole(config: JsonObject, tensors: Mapping[str, Tensor], leaf: str, anatomy: Anatomy) -> None:
    """Raises FormatError where the file lacks a tensor ``leaf`` of a projection that ``target_modules`` name."""
    found = {name.removeprefix(MODEL_ROOT).removesuffix(leaf) for name in tensors if name.endswith(leaf)}
    start = f"{anatomy.prefix}." if any(name.startswith(f"{anatomy.prefix}.") for name in found) else ""
    named = (start + path for path, (_, layer) in _places(anatomy).items() if _is_targeted(config, start + path, layer))
    missing = [name for name in named if name not in found]
    if found and missing:
        raise FormatError(_lacking(missing[0], len(missing)))


def _lacking(module: str, count: int) -> str:
    others = f" and of {count - 1} other modules" if count > 1 else ""
    return f"the file lacks the tensors of {module}{others}, which target_modules name; copy it again"


def _is_targeted(config: JsonObject, module: str, layer: int | None) -> bool:
    """Whether peft changes the module of that full name; False where that cannot be told."""
    layers = config.get("layers_to_transform")
    if layers is not None and layer not in (layers if isinstance(layers, list) else [layers]):
        return False
    return _named(config.get("target_modules"), module, False) and not _named(
        config.get("exclude_modules"), module, True
    )


def _named(targets: object, module: str, doubt: bool) -> bool:
    """Whether a list of names or a pattern means a module, as peft reads them; ``doubt`` for patterns not read here."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        most = max(part.count("*") + part.count("+") for part in targets.split("|"))
        if len(targets) > 500 or most > 3 or not _TARGETS.fullmatch(targets):
            return doubt
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return doubt
    return isinstance(targets, list) and any(module == name or module.endswith(f".{name}") for name in targets)


def beft_delta(tensors: Tensors, anatomy: Anatomy) -> tuple[Bitfit, Tensors]:
    """Spec and stacks of a BEFT checkpoint; biases that it leaves alone are zero."""
    places, found = _places(anatomy), {}
    for name in [name for name in tensors if name.endswith(".beft_bias")]:
        module = name.removeprefix(MODEL_ROOT).removesuffix(".beft_bias")
        path = _path(module, anatomy, places)
        if path is None:
            raise _unknown(module, anatomy)
        found[f"{path}.beft_bias"] = tensors.pop(name)
    attention = Bitfit("attention")
    near = {f"{path}.beft_bias" for path in modules(attention, anatomy)}
    spec = attention if found.keys() <= near else Bitfit("all")
    written = {f"{path}.beft_bias": torch.zeros(1, width(path, anatomy)) for path in modules(spec, anatomy)}
    beyond = sorted(found.keys() - written.keys())
    if beyond or not found:
        raise Unsupported(f"BEFT on {beyond[0] if beyond else 'no module'} is not read here; biases of linears are")
    return spec, {f"bitfit.{name}": bias for name, bias in read_beft(written | found, spec, anatomy, "").items()}


def _places(anatomy: Anatomy) -> dict[str, tuple[str, int]]:
    """Slot and layer of every whole linear module, by path."""
    whole = [slot for slot in anatomy.slots.values() if slot.name in LINEAR_SLOTS and slot.part is None]
    return {path: (slot.name, layer) for slot in whole for layer, path in enumerate(slot.paths) if path is not None}


def _path(module: str, anatomy: Anatomy, places: JsonObject) -> str | None:
    """A module's path in the headless encoder, ``None`` for what is no linear of a layer."""
    return next((path for path in (module, module.removeprefix(f"{anatomy.prefix}.")) if path in places), None)


def _unknown(module: str, anatomy: Anatomy) -> Unsupported:
    return Unsupported(f"{module[:120]!r} is no linear projection of a layer of {anatomy.family}; {MERGE}")


def _pair(module: str, name: str, tensors: Tensors, config: JsonObject, inputs: int, outputs: int) -> Pair:
    a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
    rank = len(a) if a.dim() == 2 else 0
    if b is None or not rank or tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
        shapes = f"{list(a.shape)} and {None if b is None else list(b.shape)}"
        raise FormatError(f"{module}: lora_A and lora_B are {shapes}; expected [r, {inputs}] and [{outputs}, r]")
    alpha = conform(_alpha(module, config), float, "lora_alpha")
    return Pair(a, b, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _alpha(module: str, config: JsonObject) -> object:
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


def _spec(config: JsonObject, pairs: Mapping[tuple[str, int], Pair], anatomy: Anatomy) -> Lora:
    ranks, alphas = {len(pair.a) for pair in pairs.values()}, {pair.alpha for pair in pairs.values()}
    layers = tuple(sorted({layer for _, layer in pairs}))
    rank, alpha = max(ranks), next(iter(alphas))
    alike = len(ranks) == len(alphas) == 1 and alpha > 0
    return Lora(
        targets=tuple(name for name in anatomy.linear_slots if any(slot == name for slot, _ in pairs)),
        rank=rank,
        alpha=alpha if alike else float(rank),
        dropout=conform(config.get("lora_dropout") or 0.0, float, "lora_dropout"),
        rslora=alike and bool(config.get("use_rslora")),
        layers=None if layers == tuple(range(anatomy.layers)) else layers,
    )


def _stacks(spec: Lora, pairs: Mapping[tuple[str, int], Pair], anatomy: Anatomy) -> Tensors:
    layers = spec.layers or tuple(range(anatomy.layers))
    stacks: Tensors = {}
    for name in spec.targets:
        slot = anatomy.slot(name)
        none = Pair(torch.zeros(0, slot.inputs), torch.zeros(slot.outputs, 0), 1.0, 1.0)
        chosen = [pairs.get((name, layer), none) for layer in layers]
        stacks[f"lora.{name}.a"] = torch.stack([_rows(pair.a, spec.rank) for pair in chosen])
        stacks[f"lora.{name}.b"] = torch.stack([_rows(_scaled(pair, spec).T, spec.rank) for pair in chosen])
    return stacks


def _scaled(pair: Pair, spec: Lora) -> Tensor:
    """B for the spec's scale; untouched where the module's is the same."""
    return pair.b if pair.scale == spec.scale else pair.b * (pair.scale / spec.scale)


def _rows(tensor: Tensor, rank: int) -> Tensor:
    return pad(tensor, (0, 0, 0, rank - len(tensor)))
