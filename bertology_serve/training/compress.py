"""A fully tuned model as a delta: what its weights are beside the base's, in as few numbers as are asked for.

Each linear's difference W - W₀ is cut to a rank by its truncated singular value decomposition, which is the nearest
matrix of that rank (Eckart and Young 1936), and becomes a LoRA update; or to its largest entries, a sparse update, for
models of which only a part was tuned (Child-Tuning, top-k). The differences of the biases and of the LayerNorms are
kept whole.
The difference of a fine-tuned model has a low intrinsic rank (Aghajanyan et al. 2020, arXiv 2012.13255); how low is
measured, not assumed. What a packed batch cannot change for some rows only (the embeddings' tables) is dropped, and
named with its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.kinds import sparse
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.bitfit import reached as reached_biases
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.norms import reached as reached_norms
from bertology_serve.kinds.slots import QKV, UP_GATE, Anatomy, Slot
from bertology_serve.kinds.sparse import Sparse
from bertology_serve.training.regularisers import largest


@dataclass(frozen=True)
class Budget:
    """``rank`` of every update, or the share of the differences' ``energy`` (their squares' sum) that it must keep, or
    the ``share`` of their entries that is kept, the largest in magnitude: in all, or with ``per_tensor`` a linear.
    """

    rank: int | None = None
    energy: float | None = None
    share: float | None = None
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if [self.rank, self.energy, self.share].count(None) != 2:
            raise SpecError("give a rank, an energy or a share, such as --rank 8, --energy 0.9 or --share 0.01")
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"rank is {self.rank}; expected a whole number from 1 up")
        for name, value in (("energy", self.energy), ("share", self.share)):
            if value is not None and not 0 < value <= 1:
                raise SpecError(f"{name} is {value}; expected a share above 0, up to 1")
        if self.per_tensor and self.share is None:
            raise SpecError("per_tensor is for a share of the entries; give --share too, or leave --per-tensor out")

    def approximate(self, changes: Changes, anatomy: Anatomy) -> Approximation:
        if not changes:
            return Approximation()
        if self.share is not None:
            return largest_entries(changes, anatomy, self.share, self.per_tensor)
        return low_rank(changes, anatomy, self.rank, self.energy)


@dataclass(frozen=True)
class Compressed:
    """``delta`` stands for the whole model. ``kept`` is the share of the energy by layer and in all (``all``).

    ``rank`` is how many rows a linear's update takes in a batch, at most. ``dropped`` are the norms of the
    differences that no delta holds, by the weights' names.
    """

    delta: Delta
    rank: int
    kept: Mapping[str, float]
    dropped: Mapping[str, float]


def compress(whole: Delta, encoder: Encoder, budget: Budget, name: str) -> Compressed:
    """A delta on the base for a whole checkpoint ``whole``; ``encoder`` is that base.

    Raises SpecError for a delta that is none, or that moved nothing, BaseMismatch for another base.
    """
    if not whole.weights:
        raise SpecError(f"{whole.name} is a delta already ({' + '.join(whole.kinds)}); compress is for whole models")
    if whole.base.sha256 != encoder.ref.sha256:
        raise BaseMismatch(
            f"{whole.name} was tuned from {whole.base.name} (weights {whole.base.sha256[:12]}), but this is "
            f"{encoder.name} (weights {encoder.ref.sha256[:12]}); give that encoder"
        )
    moved = differences(whole.weights, encoder.model.state_dict())
    anatomy = encoder.anatomy
    changes, biases, norms = dict(_matrices(moved, anatomy)), moved_biases(moved, anatomy), moved_norms(moved, anatomy)
    if not changes and not biases and not norms:
        raise SpecError(f"{whole.name} has the base's own linears, biases and norms; there is nothing to compress")
    found = budget.approximate(changes, anatomy)
    specs, tensors = found.specs, dict(found.tensors)
    for spec, exact in ((Bitfit(), biases), (Norms(biases=False), norms)):
        specs, tensors = (*specs, spec) if exact else specs, {**tensors, **exact}
    kept = _kept(changes, found.inside)
    facts = {**whole.provenance, "compressed": {"from": whole.name, "rank": found.rank, "energy": kept["all"]}}
    delta = replace(
        whole, name=name, specs=specs, tensors=tensors, weights={}, version="", metrics={}, provenance=facts
    )
    return Compressed(delta, found.rank, kept, dropped(moved, anatomy))


def differences(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What moved, by name: float64 on the CPU."""
    pairs = {name: (tensor.cpu().double(), base[name].cpu().double()) for name, tensor in tuned.items()}
    found = {name: own - theirs for name, (own, theirs) in pairs.items() if tuned[name].is_floating_point()}
    return {name: change for name, change in found.items() if change.any()}


def _slots(anatomy: Anatomy) -> list[Slot]:
    """The linears that updates stand on: slices of packed projections are slots of their own."""
    return [anatomy.slot(name) for name in anatomy.linear_slots if name not in (QKV, UP_GATE)]


def _matrices(moved: Mapping[str, Tensor], anatomy: Anatomy) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """The differences [N, K] of the linears, by slot and layer."""
    for slot in _slots(anatomy):
        for layer in slot.present:
            change = _own(moved.get(f"{slot.paths[layer]}.weight"), slot)
            if change is not None:
                yield (slot.name, layer), change


def _own(change: Tensor | None, slot: Slot) -> Tensor | None:
    """The rows that a slot names, ``None`` where they did not move."""
    if change is None:
        return None
    rows = change if slot.part is None else change[slice(*slot.part)]
    return rows if rows.any() else None


def moved_biases(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
    """The differences of all biases as BitFit holds them; none where no bias moved."""
    tensors: dict[str, Tensor] = {}
    any_moved = False
    for slot, layers in reached_biases(Bitfit(), anatomy):
        stack = torch.zeros(len(layers), slot.outputs)
        for index, layer in enumerate(layers):
            change = _own(moved.get(f"{slot.paths[layer]}.bias"), slot)
            if change is not None:
                stack[index, : len(change)], any_moved = change.float(), True
        tensors[f"bitfit.{slot.name}"] = stack
    return tensors if any_moved else {}


def moved_norms(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
    """The differences of the LayerNorms' weights; none where no such weight moved."""
    found = reached_norms(Norms(), anatomy)
    names = {slot.name: [f"{slot.paths[layer]}.weight" for layer in layers] for slot, layers in found}
    if not any(name in moved for own in names.values() for name in own):
        return {}
    blank = {slot.name: torch.zeros(slot.outputs, dtype=torch.float64) for slot, _ in found}
    return {
        f"norms.{slot}.weight": torch.stack([moved.get(name, blank[slot]) for name in own]).float()
        for slot, own in names.items()
    }


def _kept(changes: Changes, inside: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """The share of the energy that is ``inside``, by layer and in all."""
    layers = [str(layer) for layer in sorted({layer for _, layer in changes})]
    whole, own = dict.fromkeys([*layers, "all"], 0.0), dict.fromkeys([*layers, "all"], 0.0)
    for (slot, layer), change in changes.items():
        for key in (str(layer), "all"):
            whole[key] += float(change.square().sum())
            own[key] += inside[slot, layer]
    return {key: own[key] / whole[key] if whole[key] else 1.0 for key in whole}


def dropped(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, float]:
    """The norms of what moved and is in no update."""
    held = {f"{path}.weight" for slot in _slots(anatomy) for path in slot.paths}
    held |= {f"{path}.weight" for slot, _ in reached_norms(Norms(), anatomy) for path in slot.paths}
    held |= {f"{path}.bias" for slot, _ in reached_biases(Bitfit(), anatomy) for path in slot.paths}
    return {name: float(change.norm()) for name, change in moved.items() if name not in held}


Changes = Mapping[tuple[str, int], Tensor]
"""W - W₀ [N, K] in float64 by slot and layer."""


@dataclass(frozen=True)
class Approximation:
    """A delta's ``specs`` and ``tensors`` (float32) that stand for changes.

    ``rank`` is how many rows a linear's update takes in a batch, at most. ``inside`` is the energy (the sum of squares)
    that is kept of each change.
    """

    specs: tuple[Any, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int = 0
    inside: Mapping[tuple[str, int], float] = field(default_factory=dict)


def low_rank(changes: Changes, anatomy: Anatomy, rank: int | None, energy: float | None) -> Approximation:
    """The nearest matrices of a rank, or of the least rank that keeps a share of the energy."""
    cut = {place: torch.linalg.svd(change, full_matrices=False) for place, change in changes.items()}
    spectra = {place: singular for place, (_, singular, _) in cut.items()}
    rank = _rank(spectra, rank, energy)
    layers = tuple(sorted({layer for _, layer in cut}))
    tensors: dict[str, Tensor] = {}
    names = _names(changes, anatomy)
    for name in names:
        slot = anatomy.slot(name)
        a, b = torch.zeros(len(layers), rank, slot.inputs), torch.zeros(len(layers), rank, slot.outputs)
        for index, layer in enumerate(layers):
            if (name, layer) in cut:
                left, singular, right = cut[name, layer]
                root, count = singular[:rank].sqrt(), min(rank, len(singular))
                a[index, :count, : right.shape[1]] = (root[:, None] * right[:rank]).float()
                b[index, :count, : left.shape[0]] = (root[:, None] * left.T[:rank]).float()
        tensors |= {f"lora.{name}.a": a, f"lora.{name}.b": b}
    chosen = None if layers == tuple(range(anatomy.layers)) else layers
    inside = {place: float(singular[:rank].square().sum()) for place, singular in spectra.items()}
    return Approximation((Lora(names, rank, float(rank), layers=chosen),), tensors, rank, inside)


def largest_entries(changes: Changes, anatomy: Anatomy, share: float, per_tensor: bool) -> Approximation:
    """The ``share`` of all entries that is largest in magnitude, or with ``per_tensor`` that share of every change."""
    sizes = {place: change.abs() for place, change in changes.items()}
    groups = [{place: size} for place, size in sizes.items()] if per_tensor else [sizes]
    masks = {place: mask for group in groups for place, mask in largest(group, share).items()}
    kept = {place: change * masks[place] for place, change in changes.items()}
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    ranks = [0]
    for name in _names(changes, anatomy):
        slot = anatomy.slot(name)
        stack = torch.zeros(slot.depth, slot.outputs, slot.inputs)
        for (owner, layer), change in kept.items():
            if owner == name:
                stack[layer, : change.shape[0], : change.shape[1]] = change.float()
        if stack.any():
            own = sparse.entries(stack)
            counts[name] = len(own["values"])
            ranks.append(sparse.low_rank(stack).a.shape[1])
            tensors |= {f"sparse.{name}.{part}": tensor for part, tensor in own.items()}
    inside = {place: float(change.square().sum()) for place, change in kept.items()}
    return Approximation((Sparse(tuple(counts), tuple(counts.values())),), tensors, max(ranks), inside)


def _names(changes: Changes, anatomy: Anatomy) -> tuple[str, ...]:
    changed = {name for name, _ in changes}
    return tuple(name for name in anatomy.linear_slots if name in changed)


def _rank(spectra: Changes, rank: int | None, energy: float | None) -> int:
    """The rank asked for, or the least that keeps the energy; no more than there are singular values."""
    most = max(len(singular) for singular in spectra.values())
    if rank is not None:
        return min(rank, most)
    assert energy is not None
    energies = torch.stack([pad(singular.square(), (0, most - len(singular))) for singular in spectra.values()]).sum(0)
    shares = energies.cumsum(0) / energies.sum()
    return int((shares < energy - 1e-12).sum()) + 1
