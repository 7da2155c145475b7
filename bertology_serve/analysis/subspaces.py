"""The directions that a change of a weight acts on, and how far those of two changes are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.analysis.weights import own_tensor
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.slots import QKV, UP_GATE, Anatomy

MOST = 8  # directions that are compared
SMALLEST = 1e-6  # of the largest singular value: below it a direction is noise


@dataclass(frozen=True)
class Directions:
    """The singular vectors of a change [N, K], of its largest values first: ``left`` [N, k], ``right`` [K, k]."""

    left: Tensor
    right: Tensor


def low_rank_directions(a: Tensor, b: Tensor) -> Directions:
    """Of Bᵀ A for a [R, K] and b [R, N], without making the [N, K] product."""
    right, left = torch.linalg.qr(a.double().T), torch.linalg.qr(b.double().T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    return _kept(left.Q @ u, values, right.Q @ v.T)


def dense_directions(change: Tensor) -> Directions:
    """Of a change [N, K]."""
    u, values, v = torch.linalg.svd(change.double(), full_matrices=False)
    return _kept(u, values, v.T)


def _kept(left: Tensor, values: Tensor, right: Tensor) -> Directions:
    count = min(MOST, int((values > SMALLEST * values.max().clamp(min=1e-300)).sum()))
    return Directions(left[:, :count], right[:, :count])


def directions_of(delta: Delta, anatomy: Anatomy, base: Mapping[str, Tensor]) -> dict[tuple[str, int], Directions]:
    """Those of every linear that the delta changes by a matrix, by slot and layer."""
    found = {}
    if not delta.weights:
        for name, update in delta.effects(anatomy).low_rank.items():
            slot = anatomy.slots[name]
            for layer in slot.present:
                a, b = update.at(slot, layer)
                if a.any() and b.any():
                    found[name, layer] = low_rank_directions(a, b)
        return found
    for slot in anatomy.slots.values():
        for layer in slot.present if slot.inputs and slot.depth > 1 and slot.name not in (QKV, UP_GATE) else ():
            before, after = (own_tensor(slot, layer, "weight", tensors) for tensors in (base, delta.weights))
            if before is not None and after is not None and before.dim() == 2 and not torch.equal(before, after):
                found[slot.name, layer] = dense_directions(after.double() - before.double())
    return found


def overlap(first: Tensor, second: Tensor) -> float:
    """‖Uᵀ V‖² / min(i, j) of orthonormal columns U [n, i] and V [n, j] (Hu et al. 2021, eq. 4).

    1 where one subspace lies in the other, 0 where they are orthogonal; max(i, j) / n for random ones.
    """
    return float((first.T @ second).square().sum()) / max(1, min(first.shape[1], second.shape[1]))
