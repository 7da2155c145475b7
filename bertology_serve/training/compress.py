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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bertology_serve.deltas.bitfit import BitfitSpec
from bertology_serve.deltas.bitfit import slots as bias_slots
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.norms import NormsSpec
from bertology_serve.deltas.norms import slots as norm_slots
from bertology_serve.deltas.slots import QKV, UP_GATE, Anatomy, Slot
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.training.approximation import Approximation, Changes, largest_entries, low_rank


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
        """What stands for the changes."""
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
    for spec, exact in ((BitfitSpec(), biases), (NormsSpec(biases=False), norms)):
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
    for slot in bias_slots(BitfitSpec(), anatomy):
        stack = torch.zeros(len(slot.present), slot.outputs)
        for index, layer in enumerate(slot.present):
            change = _own(moved.get(f"{slot.paths[layer]}.bias"), slot)
            if change is not None:
                stack[index, : len(change)], any_moved = change.float(), True
        tensors[f"bitfit.{slot.name}"] = stack
    return tensors if any_moved else {}


def moved_norms(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
    """The differences of the LayerNorms' weights; none where no such weight moved."""
    names = {slot.name: [f"{slot.paths[layer]}.weight" for layer in slot.present] for slot in norm_slots(anatomy)}
    if not any(name in moved for own in names.values() for name in own):
        return {}
    blank = {slot.name: torch.zeros(slot.outputs, dtype=torch.float64) for slot in norm_slots(anatomy)}
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
    held |= {f"{path}.weight" for slot in norm_slots(anatomy) for path in slot.paths}
    held |= {f"{path}.bias" for slot in bias_slots(BitfitSpec(), anatomy) for path in slot.paths}
    return {name: float(change.norm()) for name, change in moved.items() if name not in held}
