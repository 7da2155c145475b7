"""The changes of linears in fewer numbers: as matrices of low rank, or as their largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bertology_serve.deltas import sparse
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.deltas.slots import Anatomy
from bertology_serve.deltas.sparse import SparseSpec
from bertology_serve.training.child_tuning import largest

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
    return Approximation((LoraSpec(names, rank, float(rank), layers=chosen),), tensors, rank, inside)


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
    return Approximation((SparseSpec(tuple(counts), tuple(counts.values())),), tensors, max(ranks), inside)


def _names(changes: Changes, anatomy: Anatomy) -> tuple[str, ...]:
    """The slots that were changed, in the anatomy's order."""
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
