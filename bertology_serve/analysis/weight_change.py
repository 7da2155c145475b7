"""How far a delta moved weights and features: norms, spectra, the directions that a change acts on, linear CKA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.slots import QKV, UP_GATE, Anatomy, Slot


@dataclass(frozen=True)
class Move:
    """One tensor that moved: ``frobenius`` of the change; ``relative`` to the base's norm, if the base has one.

    ``layer`` is None outside the layers. ``singular`` values, largest first, are those of updates of a linear.
    """

    slot: str
    layer: int | None
    part: str
    frobenius: float
    relative: float | None
    singular: tuple[float, ...] = ()

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of the singular values scaled to sum 1 (Roy and Vetterli 2007)."""
        return effective_rank(torch.tensor(self.singular, dtype=torch.float64)) if self.singular else None

    def as_row(self) -> JsonObject:
        largest = self.singular[0] if self.singular else None
        return {"slot": self.slot, "layer": self.layer, "part": self.part, "frobenius": self.frobenius,
                "relative": self.relative, "rank": len(self.singular) or None,
                "effective_rank": self.effective_rank, "largest_singular_value": largest}  # fmt: skip


def effective_rank(singular: Tensor) -> float:
    """Between 1 and the number of values; 0 where all of them are 0."""
    total = float(singular.sum())
    return float(torch.special.entr(singular / total).sum().exp()) if total > 0 else 0.0


def low_rank_singular(a: Tensor, b: Tensor) -> Tensor:
    """Singular values of Bᵀ A, for a [R, K] and b [R, N], without making the [N, K] product: at most R of them."""
    right, left = torch.linalg.qr(a.double().T).R, torch.linalg.qr(b.double().T).R
    return torch.linalg.svdvals(left @ right.T)  # type: ignore[no-any-return]


def moves(delta: Delta, anatomy: Anatomy, base: Mapping[str, Tensor]) -> Iterator[Move]:
    """What a delta does to the weights ``base`` (the encoder's state dict)."""
    return (
        moves_between(delta.weights, anatomy, base)
        if delta.weights
        else moves_of(delta.effects(anatomy), anatomy, base)
    )


def moves_of(effects: Effects, anatomy: Anatomy, base: Mapping[str, Tensor]) -> Iterator[Move]:
    """What a delta's components do to the weights ``base`` (the encoder's state dict)."""
    for name, update in effects.low_rank.items():
        slot = anatomy.slots[name]
        for layer in slot.present:
            if update.a[layer].any() or update.b[layer].any():
                singular = low_rank_singular(update.a[layer], update.b[layer])
                norm = float(singular.square().sum().sqrt())
                weight = own_tensor(slot, layer, "weight", base)
                yield _move(slot, layer, "weight", norm, weight, tuple(singular.tolist()))
    for name, shift in effects.bias.items():
        slot = anatomy.slots[name]
        for layer in slot.present:
            yield _move(slot, layer, "bias", float(shift[layer].double().norm()), own_tensor(slot, layer, "bias", base))
    for part, stacks in (("factors of outputs", effects.scale), ("factors of inputs", effects.inner)):
        for name, added in stacks.items():
            slot = anatomy.slots[name]
            for layer in slot.present:
                place = layer if slot.depth > 1 else None
                norm = float(added[layer].double().norm())  # of what is added to factors of 1, or to a norm's weight
                if slot.inputs:
                    yield Move(name, place, part, norm, norm / added.shape[1] ** 0.5)
                else:
                    yield _move(slot, layer, "weight", norm, own_tensor(slot, layer, "weight", base))
    yield from _added(effects)


def _added(effects: Effects) -> Iterator[Move]:
    """Adapters, prompts and prefixes stand beside the weights: they have norms, and no base."""
    for name, unit in effects.bottleneck.items():
        for layer in unit.layers:
            for part, stack in (("adapter down", unit.down), ("adapter up", unit.up)):
                singular = torch.linalg.svdvals(stack[layer].double())
                yield Move(name, layer, part, float(stack[layer].double().norm()), None, tuple(singular.tolist()))
    if effects.prompt is not None:
        yield Move("prompt", None, "vectors", float(effects.prompt.vectors.double().norm()), None)
    if effects.prefix is not None:
        for part, stack in (("keys", effects.prefix.keys), ("values", effects.prefix.values)):
            for layer, rows in enumerate(stack):
                yield Move("prefix", layer, part, float(rows.double().norm()), None)


def moves_between(tuned: Mapping[str, Tensor], anatomy: Anatomy, base: Mapping[str, Tensor]) -> Iterator[Move]:
    """How far a whole model moved from its base: every slot, then what belongs to no slot, by its name."""
    seen = set()
    for slot in anatomy.slots.values():
        for layer in slot.present:
            for part in ("weight", "bias"):
                before, after = (own_tensor(slot, layer, part, tensors) for tensors in (base, tuned))
                seen.add(f"{slot.paths[layer]}.{part}")
                if before is None or after is None or slot.name in (QKV, UP_GATE):
                    continue
                change = after.double() - before.double()
                singular = torch.linalg.svdvals(change) if change.dim() == 2 else torch.empty(0)
                yield _move(slot, layer, part, float(change.norm()), before, tuple(singular.tolist()))
    for name in sorted(base.keys() - seen):
        if name in tuned and base[name].is_floating_point():
            norm, size = float((tuned[name].double() - base[name].double()).norm()), float(base[name].double().norm())
            yield Move(name, None, "weight", norm, norm / size if size else None)


def own_tensor(slot: Slot, layer: int, part: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """A slot's weight [N, K] or bias [N] among a model's tensors; of packed projections its own rows."""
    tensor = tensors.get(f"{slot.paths[layer]}.{part}")
    if tensor is None or slot.part is None:
        return tensor
    return tensor[slice(*slot.part)]


def _move(
    slot: Slot, layer: int, part: str, norm: float, before: Tensor | None, singular: tuple[float, ...] = ()
) -> Move:
    size = 0.0 if before is None else float(before.double().norm())
    place = layer if slot.depth > 1 else None
    return Move(slot.name, place, part, norm, norm / size if size else None, singular)


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


class LinearCka:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, Frobenius norms, from sums that rows are added to batch by batch.

    Memory is three [H, H] float64 matrices, however many rows there are. Also gathers how far rows moved:
    ‖y - x‖ / ‖x‖, averaged over rows.
    """

    def __init__(self, width: int) -> None:
        self.products = torch.zeros(3, width, width, dtype=torch.float64)  # XᵀX, YᵀY, YᵀX
        self.sums = torch.zeros(2, width, dtype=torch.float64)
        self.rows = 0
        self.moved = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x and y [n, H] of the two models."""
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        for product, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True):
            product += left.T @ right
        self.sums += torch.stack([x.sum(0), y.sum(0)])
        self.rows += len(x)
        self.moved += float(((y - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)).sum())

    @property
    def value(self) -> float:
        """Between 0 and 1; 1 for representations that differ by rotation, scale and shift only."""
        x, y = self.sums
        centred = [
            product - torch.outer(left, right) / self.rows
            for product, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True)
        ]
        own_x, own_y, cross = (matrix.square().sum() for matrix in centred)
        return float(cross / (own_x.sqrt() * own_y.sqrt()).clamp(min=1e-300))

    @property
    def drift(self) -> float:
        """Mean of ‖y - x‖ / ‖x‖ over the rows."""
        return self.moved / max(1, self.rows)
