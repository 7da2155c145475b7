"""LoRA: low-rank updates of linear projections (Hu et al. 2021, arXiv 2106.09685).

``y = W x + b + scale · B A dropout(x)`` with ``scale = alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.config_fields import check_known, named_fields
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects, Layers, LowRank, spread
from bertology_serve.kinds.kinds import (
    Cut,
    Kind,
    Tensors,
    check_layers,
    check_names,
    check_positive,
    check_share,
    chosen_layers,
    zeros,
)
from bertology_serve.kinds.peft_format import (
    MERGE,
    MODEL_ROOT,
    Block,
    Config,
    PeftFormat,
    check_rest,
    modules,
    named_layers,
    number,
    padded,
    path_of,
    places,
    take,
    targets,
    unknown,
    width,
)
from bertology_serve.kinds.slots import Anatomy


@named_fields
@dataclass(frozen=True)
class Lora:
    """``targets`` are slot names, ``layers`` layer indices from 0 (``None``: all), ``init`` draws A; B starts at zero.

    ``init="kaiming"`` is the official code's uniform distribution of standard deviation ``1/sqrt(3 K)``;
    ``"gaussian"`` is N(0, 1/rank²), as peft does. Raises SpecError for values that make no sense.
    """

    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    layers: Layers = None

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, alpha=self.alpha)
        check_share(dropout=self.dropout)
        check_known("init", self.init, ("kaiming", "gaussian"))
        check_layers(self, self.layers)
        check_names(targets=self.targets)

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


def _modules(spec: Lora, anatomy: Anatomy) -> dict[str, list[Block]]:
    names = anatomy.resolve(spec.targets)
    return modules(((name, chosen_layers(spec.layers, anatomy.slot(name).depth)) for name in names), anatomy)


def write(spec: Lora, own: Mapping[str, Tensor], anatomy: Anatomy, root: str) -> Tensors:
    """Stacks ``{slot}.a`` [L, R, K] and ``.b`` [L, R, N] as ``lora_A`` [n R, K] and ``lora_B`` [N, n R] a module.

    Of n slots that share a module the A blocks stand one above the other, and B is block-diagonal with zero rows where
    no slot reaches.
    """
    written: Tensors = {}
    for path, blocks in _modules(spec, anatomy).items():
        b = own[f"{blocks[0].slot}.b"].new_zeros(width(path, anatomy), spec.rank * len(blocks))
        for i, block in enumerate(blocks):
            b[block.lo : block.hi, i * spec.rank : (i + 1) * spec.rank] = own[f"{block.slot}.b"][
                block.index, :, : block.width
            ].T
        written[f"{root}{path}.lora_A.weight"] = torch.cat([own[f"{x.slot}.a"][x.index, :, : x.inputs] for x in blocks])
        written[f"{root}{path}.lora_B.weight"] = b
    return written


def read(spec: Lora, written: Tensors, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write``; takes what it reads out of ``written``."""
    stacks: dict[str, list[Tensor]] = {}
    for path, blocks in _modules(spec, anatomy).items():
        ranks = spec.rank * len(blocks)
        a = take(written, f"{root}{path}.lora_A.weight", (ranks, blocks[0].inputs))
        b = take(written, f"{root}{path}.lora_B.weight", (width(path, anatomy), ranks))
        rest = b.clone()
        for i, block in enumerate(blocks):
            mine = slice(i * spec.rank, (i + 1) * spec.rank)
            slot = anatomy.slot(block.slot)
            stacks.setdefault(f"{block.slot}.a", []).append(padded(a[mine], slot.inputs))
            stacks.setdefault(f"{block.slot}.b", []).append(padded(b[block.lo : block.hi, mine].T, slot.outputs))
            rest[block.lo : block.hi, mine] = 0
        check_rest(rest, f"{root}{path}.lora_B.weight")
    return {name: torch.stack(parts).contiguous() for name, parts in stacks.items()}


def config(spec: Lora, anatomy: Anatomy, root: str) -> JsonObject:
    """Modules that several slots share have n times the rank, and the alpha that leaves the scale as it is."""
    shares = {path: len(blocks) for path, blocks in _modules(spec, anatomy).items()}
    usual = min(shares.values())
    others = {f"{root}{path}": n for path, n in shares.items() if n != usual}
    return {
        "r": spec.rank * usual,
        "lora_alpha": _whole_alpha(spec, usual),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "bias": "none",
        "target_modules": targets(shares, anatomy, root),
        "rank_pattern": {name: spec.rank * n for name, n in others.items()},
        "alpha_pattern": {name: _whole_alpha(spec, n) for name, n in others.items()},
    }


def _whole_alpha(spec: Lora, shares: int) -> int | float:
    alpha = spec.alpha * (math.sqrt(shares) if spec.rslora else shares)
    return int(alpha) if alpha == int(alpha) else alpha


@dataclass(frozen=True)
class Pair:
    """One module's LoRA: ``a`` [r, K], ``b`` [N, r], and the factor of their product."""

    a: Tensor
    b: Tensor
    alpha: float
    scale: float


def load(config: Config, tensors: Tensors, anatomy: Anatomy) -> tuple[Lora, Tensors]:
    """Spec and stacks of a LoRA checkpoint; takes the tensors of the encoder's modules out of ``tensors``.

    What is left may be the head's. Modules of lower rank than the highest get zero rows; where scales differ they are
    folded into B.
    """
    known, pairs = places(anatomy), {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix(MODEL_ROOT).removesuffix(".lora_A.weight")
        path = path_of(module, anatomy, known)
        if path is None:
            continue
        slot, layer = known[path]
        pairs[slot, layer] = pair_of(
            module, name, tensors, config, anatomy.slot(slot).inputs, anatomy.slot(slot).outputs
        )
    if not pairs:
        check_none_left(tensors, anatomy)
        raise FormatError("the checkpoint holds no LoRA tensors; expected ...lora_A.weight and ...lora_B.weight")
    spec = _spec(config, pairs, anatomy)
    return spec, _stacks(spec, pairs, anatomy)


def check_none_left(tensors: Mapping[str, Tensor], anatomy: Anatomy) -> None:
    """Raises Unsupported for a LoRA tensor that belongs neither to a layer nor to the head."""
    for name in tensors:
        module, _, part = name.removeprefix(MODEL_ROOT).partition(".lora_")
        if part in ("A.weight", "B.weight"):
            raise unknown(module, anatomy)
        if part:
            raise Unsupported(f"the tensor {name[:120]!r} is no plain LoRA of a linear projection; {MERGE}")


def pair_of(module: str, name: str, tensors: Tensors, config: Config, inputs: int, outputs: int) -> Pair:
    """The LoRA of one module [N, K] whose A is called ``name``, taken out of ``tensors``."""
    a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
    rank = len(a) if a.dim() == 2 else 0
    if b is None or not rank or tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
        shapes = f"{list(a.shape)} and {None if b is None else list(b.shape)}"
        raise FormatError(f"{module}: lora_A and lora_B are {shapes}; expected [r, {inputs}] and [{outputs}, r]")
    alpha = number(_alpha(module, config), "lora_alpha")
    return Pair(a, b, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


# Few repetitions, few groups and none that repeats: a hostile pattern cannot take exponential time.
_PATTERN = re.compile(r"\^?(?:[\w.*+\\$|\[\]-]|\((?:\?:)?|\)(?![*+?{]))+")


def _alpha(module: str, config: Config) -> object:
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


def _spec(config: Config, pairs: Mapping[tuple[str, int], Pair], anatomy: Anatomy) -> Lora:
    ranks, alphas = {len(pair.a) for pair in pairs.values()}, {pair.alpha for pair in pairs.values()}
    rank, alpha = max(ranks), next(iter(alphas))
    alike = len(ranks) == len(alphas) == 1 and alpha > 0
    return Lora(
        targets=tuple(name for name in anatomy.linear_slots if any(slot == name for slot, _ in pairs)),
        rank=rank,
        alpha=alpha if alike else float(rank),
        dropout=number(config.get("lora_dropout") or 0.0, "lora_dropout"),
        rslora=alike and bool(config.get("use_rslora")),
        layers=named_layers((layer for _, layer in pairs), anatomy),
    )


def _stacks(spec: Lora, pairs: Mapping[tuple[str, int], Pair], anatomy: Anatomy) -> Tensors:
    layers = spec.layers or tuple(range(anatomy.layers))
    stacks: Tensors = {}
    for name in spec.targets:
        slot = anatomy.slot(name)
        none = Pair(torch.zeros(0, slot.inputs), torch.zeros(slot.outputs, 0), 1.0, 1.0)
        chosen = [pairs.get((name, layer), none) for layer in layers]
        stacks[f"{name}.a"] = torch.stack([_rows(pair.a, spec.rank) for pair in chosen])
        stacks[f"{name}.b"] = torch.stack([_rows(_scaled(pair, spec).T, spec.rank) for pair in chosen])
    return stacks


def _scaled(pair: Pair, spec: Lora) -> Tensor:
    """B for the spec's scale; untouched where the module's is the same."""
    return pair.b if pair.scale == spec.scale else pair.b * (pair.scale / spec.scale)


def _rows(tensor: Tensor, rank: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, rank - len(tensor)))


PEFT = PeftFormat("LORA", write, read, config, load, leaf=".lora_A.weight")
LORA = Kind("lora", Lora, init, effects, cut, peft=PEFT)
