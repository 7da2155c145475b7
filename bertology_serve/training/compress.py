"""A fully tuned model as a delta: what its weights are beside the base's, in as few rows as are asked for.

Each linear's difference W - W₀ is cut to a rank by its truncated singular value decomposition, which is the nearest
matrix of that rank (Eckart and Young 1936), and becomes a LoRA update; the differences of the biases and of the
LayerNorms are kept whole.
The difference of a fine-tuned model has a low intrinsic rank (Aghajanyan et al. 2020, arXiv 2012.13255); how low is
measured, not assumed. What a packed batch cannot change for some rows only (the embeddings' tables) is dropped, and
named with its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bertology_serve.deltas.bitfit import BitfitSpec
from bertology_serve.deltas.bitfit import slots as bias_slots
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.deltas.norms import NormsSpec
from bertology_serve.deltas.norms import slots as norm_slots
from bertology_serve.deltas.slots import QKV, UP_GATE, Anatomy, Slot
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, SpecError

Matrices = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Budget:
    """``rank`` of every update, or the share of the differences' ``energy`` (their squares' sum) that it must keep."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise SpecError("give either a rank or an energy, such as --rank 8 or --energy 0.9")
        if self.rank is not None and self.rank < 1:
            raise SpecError(f"rank is {self.rank}; expected a whole number from 1 up")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SpecError(f"energy is {self.energy}; expected a share above 0, up to 1")


@dataclass(frozen=True)
class Compressed:
    """``delta`` stands for the whole model. ``kept`` is the share of the energy by layer and in all (``all``).

    ``dropped`` are the norms of the differences that no delta holds, by the weights' names.
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
    matrices, biases, norms = dict(_matrices(moved, anatomy)), _biases(moved, anatomy), _norms(moved, anatomy)
    if not matrices and not biases and not norms:
        raise SpecError(f"{whole.name} has the base's own linears, biases and norms; there is nothing to compress")
    cut = {place: torch.linalg.svd(matrix, full_matrices=False) for place, matrix in matrices.items()}
    rank = _rank({place: singular for place, (_, singular, _) in cut.items()}, budget)
    specs, tensors = _low_rank(cut, rank, anatomy) if cut else ((), {})
    for spec, exact in ((BitfitSpec(), biases), (NormsSpec(biases=False), norms)):
        specs, tensors = (*specs, spec) if exact else specs, {**tensors, **exact}
    kept = _kept({place: singular for place, (_, singular, _) in cut.items()}, rank)
    facts = {**whole.provenance, "compressed": {"from": whole.name, "rank": rank, "energy": kept["all"]}}
    delta = replace(
        whole, name=name, specs=specs, tensors=tensors, weights={}, version="", metrics={}, provenance=facts
    )
    return Compressed(delta, rank, kept, _dropped(moved, anatomy))


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


def _rank(spectra: Mapping[tuple[str, int], Tensor], budget: Budget) -> int:
    """The least rank that keeps the energy asked for; no more than there are singular values."""
    most = max((len(singular) for singular in spectra.values()), default=0)
    if budget.rank is not None:
        return min(budget.rank, most)
    energies = torch.stack([pad(singular.square(), (0, most - len(singular))) for singular in spectra.values()]).sum(0)
    shares = energies.cumsum(0) / energies.sum()
    return int((shares < budget.energy - 1e-12).sum()) + 1  # type: ignore[operator]


def _low_rank(
    cut: Mapping[tuple[str, int], tuple[Tensor, Tensor, Tensor]], rank: int, anatomy: Anatomy
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """The LoRA spec and stacks ``a`` [L, R, K], ``b`` [L, R, N]: each singular value shared between the two."""
    names = [slot.name for slot in _slots(anatomy) if any(place[0] == slot.name for place in cut)]
    layers = tuple(sorted({layer for _, layer in cut}))
    tensors: dict[str, Tensor] = {}
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
    return (LoraSpec(tuple(names), rank, float(rank), layers=chosen),), tensors


def _biases(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
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


def _norms(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
    """The differences of the LayerNorms' weights; none where no such weight moved."""
    names = {slot.name: [f"{slot.paths[layer]}.weight" for layer in slot.present] for slot in norm_slots(anatomy)}
    if not any(name in moved for own in names.values() for name in own):
        return {}
    blank = {slot.name: torch.zeros(slot.outputs, dtype=torch.float64) for slot in norm_slots(anatomy)}
    return {
        f"norms.{slot}.weight": torch.stack([moved.get(name, blank[slot]) for name in own]).float()
        for slot, own in names.items()
    }


def _kept(spectra: Mapping[tuple[str, int], Tensor], rank: int) -> dict[str, float]:
    """The share of the energy within the rank, by layer and in all."""
    layers = [str(layer) for layer in sorted({layer for _, layer in spectra})]
    whole, inside = dict.fromkeys([*layers, "all"], 0.0), dict.fromkeys([*layers, "all"], 0.0)
    for (_, layer), singular in spectra.items():
        for key in (str(layer), "all"):
            whole[key] += float(singular.square().sum())
            inside[key] += float(singular[:rank].square().sum())
    return {key: inside[key] / whole[key] if whole[key] else 1.0 for key in whole}


def _dropped(moved: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, float]:
    """The norms of what moved and is in no update."""
    held = {f"{path}.weight" for slot in _slots(anatomy) for path in slot.paths}
    held |= {f"{path}.weight" for slot in norm_slots(anatomy) for path in slot.paths}
    held |= {f"{path}.bias" for slot in bias_slots(BitfitSpec(), anatomy) for path in slot.paths}
    return {name: float(change.norm()) for name, change in moved.items() if name not in held}
