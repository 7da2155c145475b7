"""How far a delta moved the weights: norms per layer and module, and the spectra of updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.effects import Effects
from bertology_serve.deltas.slots import QKV, UP_GATE, Anatomy, Slot


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

    def as_row(self) -> dict[str, Any]:
        """A line of the table."""
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
