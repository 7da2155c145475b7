"""VeRA: two trained vectors a module around a frozen random pair that all modules share (Kopiczko et al. 2023,
arXiv 2310.11454).

``y = W x + b + λ_b ⊙ (B (λ_d ⊙ (A dropout(x))))``. A is [R, K] and B [N, R] for the widest target; narrower ones take
their first columns and rows. So it is a low-rank update whose factors follow from the pair and the vectors, and is
served, folded and exported as LoRA is. λ_b begins at zero, λ_d at ``d_initial``; neither has weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bertology_serve.config_fields import named_fields
from bertology_serve.errors import FormatError, SpecError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects, Layers, LowRank, spread
from bertology_serve.kinds.kinds import (
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
    PROMPT_ROOT,
    Block,
    Config,
    PeftFormat,
    modules,
    named_layers,
    number,
    path_of,
    places,
    take,
    taken,
    targets,
)
from bertology_serve.kinds.slots import Anatomy


@named_fields
@dataclass(frozen=True)
class Vera:
    """``targets`` are slot names, ``layers`` layer indices from 0 (``None``: all). ``rank`` is R: one number a module.

    The pair is drawn from ``key`` as peft draws it (``projection_prng_key``). With ``save_projection`` it is kept
    beside the vectors, as by default in peft: another machine may round another way. Without it a delta takes a few
    kB. Raises SpecError for values that make no sense.
    """

    targets: tuple[str, ...] = ("query", "value")
    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    key: int = 0
    save_projection: bool = True
    layers: Layers = None

    def __post_init__(self) -> None:
        check_positive(rank=self.rank, d_initial=self.d_initial)
        check_share(dropout=self.dropout)
        check_layers(self, self.layers)
        check_names(targets=self.targets)
        if isinstance(self.key, bool) or not isinstance(self.key, int) or not 0 <= self.key < 2**63:
            raise SpecError(f"key is {repr(self.key)[:60]}; expected a whole number from 0 up")


def _slots(spec: Vera, anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    return {name: chosen_layers(spec.layers, anatomy.slot(name).depth) for name in anatomy.resolve(spec.targets)}


def _widest(spec: Vera, anatomy: Anatomy) -> tuple[int, int]:
    """K and N of the pair."""
    slots = [anatomy.slot(name) for name in anatomy.resolve(spec.targets)]
    return max(slot.inputs for slot in slots), max(slot.outputs for slot in slots)


@lru_cache(maxsize=8)
def projections(key: int, rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R], float32, uniform within ``sqrt(6 / fan_in)``, as peft's ``VeraModel`` draws them."""
    generator = torch.Generator().manual_seed(key)
    wide, high = (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in)) for fan_in in (inputs, rank))
    a = torch.empty(rank, inputs).uniform_(-wide, wide, generator=generator)
    return a, torch.empty(outputs, rank).uniform_(-high, high, generator=generator)


def init(spec: Vera, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """``{slot}.d`` [L, R] of ``d_initial`` and ``{slot}.b`` [L, N] zero, float32.

    Where it is kept the frozen pair, ``a`` [R, K] and ``b`` [N, R].
    """
    tensors: Tensors = {}
    for name, layers in _slots(spec, anatomy).items():
        tensors[f"{name}.d"] = zeros((len(layers), spec.rank), generator)
        if generator is not None:  # on the meta device this would import torch._dynamo
            tensors[f"{name}.d"] += spec.d_initial
        tensors[f"{name}.b"] = zeros((len(layers), anatomy.slot(name).outputs), generator)
    if spec.save_projection:
        inputs, outputs = _widest(spec, anatomy)
        tensors |= {"a": zeros((spec.rank, inputs), generator), "b": zeros((outputs, spec.rank), generator)}
        if generator is not None:
            for name, drawn in zip("ab", projections(spec.key, spec.rank, inputs, outputs), strict=True):
                tensors[name].copy_(drawn)
    return tensors


def _pair(spec: Vera, tensors: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    if spec.save_projection:
        return tensors["a"], tensors["b"]
    a, b = projections(spec.key, spec.rank, *_widest(spec, anatomy))
    like = next(iter(tensors.values()))
    return a.to(like), b.to(like)


def effects(spec: Vera, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """One low-rank update a target slot: A with its rows times λ_d, B with its rows times λ_b."""
    a, b = _pair(spec, tensors, anatomy)
    updates = {}
    for name, layers in _slots(spec, anatomy).items():
        slot = anatomy.slot(name)
        down = tensors[f"{name}.d"].unsqueeze(2) * a[:, : slot.inputs]
        up = tensors[f"{name}.b"].unsqueeze(1) * b[: slot.outputs].T
        if slot.sizes:  # columns that a narrower layer lacks
            down = down * torch.stack([_first(slot.inputs, slot.inputs_of(layer), a) for layer in layers]).unsqueeze(1)
            up = up * torch.stack([_first(slot.outputs, slot.outputs_of(layer), a) for layer in layers]).unsqueeze(1)
        depth = slot.depth
        updates[name] = LowRank(spread(down, layers, depth), spread(up, layers, depth), spec.dropout, spec.layers)
    return Effects(low_rank=updates)


def _first(width: int, count: int, like: Tensor) -> Tensor:
    """[width], 1 in the first columns."""
    return (torch.arange(width, device=like.device) < count).to(like.dtype)


def unpacked(spec: Vera, tensors: Tensors, anatomy: Anatomy) -> int:
    """Bytes of the low-rank updates that batches read."""
    sizes = (anatomy.slot(name) for name in anatomy.resolve(spec.targets))
    return sum(4 * spec.rank * slot.depth * (slot.inputs + slot.outputs) for slot in sizes)


B, D, PAIR_A, PAIR_B = ".vera_lambda_b", ".vera_lambda_d", f"{PROMPT_ROOT}vera_A", f"{PROMPT_ROOT}vera_B"


def _modules(spec: Vera, anatomy: Anatomy) -> dict[str, Block]:
    return {path: blocks[0] for path, blocks in modules(_slots(spec, anatomy).items(), anatomy).items()}


def write(spec: Vera, own: Mapping[str, Tensor], anatomy: Anatomy, root: str) -> Tensors:
    """``vera_lambda_d`` [R] and ``vera_lambda_b`` [N] a module, and where it is kept the pair."""
    written = {PAIR_A: own["a"], PAIR_B: own["b"]} if spec.save_projection else {}
    for path, block in _modules(spec, anatomy).items():
        written[root + path + D] = own[f"{block.slot}.d"][block.index]
        written[root + path + B] = own[f"{block.slot}.b"][block.index, : block.width]
    return written


def read(spec: Vera, written: Tensors, anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``write``; takes what it reads out of ``written``."""
    stacks = init(spec, anatomy, torch.Generator())
    for path, block in _modules(spec, anatomy).items():
        stacks[f"{block.slot}.d"][block.index] = take(written, root + path + D, (spec.rank,))
        stacks[f"{block.slot}.b"][block.index, : block.width] = take(written, root + path + B, (block.width,))
    if spec.save_projection:
        inputs, outputs = _widest(spec, anatomy)
        stacks["a"] = take(written, PAIR_A, (spec.rank, inputs))
        stacks["b"] = take(written, PAIR_B, (outputs, spec.rank))
    return stacks


def config(spec: Vera, anatomy: Anatomy, root: str) -> JsonObject:
    """What ``VeraConfig`` takes."""
    return {
        "r": spec.rank,
        "target_modules": targets(_modules(spec, anatomy), anatomy, root),
        "projection_prng_key": spec.key,
        "save_projection": spec.save_projection,
        "vera_dropout": spec.dropout,
        "d_initial": spec.d_initial,
        "bias": "none",
    }


def load(config: Config, tensors: Tensors, anatomy: Anatomy) -> tuple[Vera, Tensors]:
    """Spec and stacks of what peft wrote. Modules of a target slot that it leaves alone have λ_b zero."""
    known, downs, ups = places(anatomy), taken(tensors, D), taken(tensors, B)
    found = {}
    for module in dict.fromkeys((*downs, *ups)):
        path = path_of(module, anatomy, known)
        if path is None:
            raise Unsupported(f"{module[:120]!r} with VeRA is no linear projection of a layer; {MERGE}")
        if module not in downs or module not in ups:
            raise FormatError(f"{module[:120]} lacks one of vera_lambda_d and vera_lambda_b; copy it again")
        found[path] = downs[module], ups[module]
    if not found:
        raise FormatError("the checkpoint holds no VeRA tensors; expected ...vera_lambda_b and ...vera_lambda_d")
    slots = {known[path][0] for path in found}
    spec = Vera(
        tuple(name for name in anatomy.linear_slots if name in slots),
        rank=len(next(iter(found.values()))[0]),
        d_initial=number(config.get("d_initial", 0.1), "d_initial"),
        dropout=number(config.get("vera_dropout") or 0.0, "vera_dropout"),
        key=config.get("projection_prng_key", 0),
        save_projection=PAIR_A in tensors,
        layers=named_layers((known[path][1] for path in found), anatomy),
    )
    if config.get("save_projection", True) and not spec.save_projection:
        raise FormatError(f"the tensor {PAIR_A!r} is missing, which save_projection promises; copy the file again")
    written = write(spec, init(spec, anatomy, torch.Generator()), anatomy, "")
    written |= {path + leaf: rows for path, both in found.items() for leaf, rows in zip((D, B), both, strict=True)}
    if spec.save_projection:
        inputs, outputs = _widest(spec, anatomy)  # the pair is wider where peft was aimed at something wider too
        written |= {PAIR_A: take(tensors, PAIR_A)[:, :inputs], PAIR_B: take(tensors, PAIR_B)[:outputs]}
    return spec, read(spec, written, anatomy, "")


def obstacle(spec: Vera, anatomy: Anatomy) -> str:
    """The targets must be whole modules."""
    slices = [name for name in anatomy.resolve(spec.targets) if anatomy.slot(name).part is not None]
    return f"peft has one pair of vectors for the whole module of which {slices[0]} is a part" if slices else ""


SETTINGS = frozenset({"d_initial", "projection_prng_key", "save_projection", "vera_dropout"})
PEFT = PeftFormat("VERA", write, read, config, load, B, SETTINGS, obstacle)
VERA = Kind(
    "vera", Vera, init, effects, unpacked=unpacked, decays=False, frozen=frozenset({"a", "b"}), peft=PEFT
)  # fmt: skip
