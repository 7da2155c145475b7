"""Sparse updates of linear projections: ``W = W₀ + S``, of which only the entries that are not zero are stored.

S stands row by row, as in CSR. In a batch it is a low-rank update, exactly: the rows of S that hold anything, each
times a unit vector of the outputs (or the columns, times those of the inputs, where these are fewer). So it is served,
folded and exported as LoRA is, beside any other delta. What it saves is bytes on disk, not rows: entries that lie
scattered over all of S take as many rows as W₀ has. Made by ``compress``, not by training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.config_fields import named_fields
from bertology_serve.errors import FormatError, SpecError
from bertology_serve.kinds.effects import Effects, LowRank
from bertology_serve.kinds.kinds import Kind, Tensors, check_positive, zeros
from bertology_serve.kinds.slots import Anatomy


@named_fields
@dataclass(frozen=True)
class Sparse:
    """``targets`` are slot names, ``kept`` the number of entries of each, all layers together."""

    targets: tuple[str, ...]
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.targets) != len(self.kept):
            raise SpecError(f"sparse has {len(self.targets)} targets and {len(self.kept)} numbers of entries kept")
        check_positive(**dict(zip(self.targets, self.kept, strict=True)))


def init(spec: Sparse, anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """Shapes: ``{slot}.counts`` [L, N], ``{slot}.columns`` and ``{slot}.values`` [n]. Raises SpecError for training."""
    if generator is not None:
        raise SpecError("a sparse update is cut out of a fully tuned model (bertology-serve compress), not trained")
    tensors: Tensors = {}
    for name, kept in zip(spec.targets, spec.kept, strict=True):
        slot = anatomy.slot(name)
        tensors[f"{name}.counts"] = zeros((slot.depth, slot.outputs), None)
        tensors |= {f"{name}.{part}": zeros((kept,), None) for part in ("columns", "values")}
    return tensors


def entries(changes: Tensor) -> Tensors:
    """What is not zero in changes [L, N, K]: ``counts`` [L, N] a row, and ``columns`` and ``values``, row by row."""
    places = changes.nonzero(as_tuple=True)
    counts = (changes != 0).sum(2)
    return {"counts": counts.float(), "columns": places[2].float(), "values": changes[places].float()}


def matrices(own: Mapping[str, Tensor], inputs: int) -> Tensor:
    """The inverse of ``entries``: S [L, N, K] with K ``inputs``, differentiable in the values. Raises FormatError."""
    counts, columns, values = own["counts"].detach().long(), own["columns"].detach().long(), own["values"]
    whole = torch.equal(counts, own["counts"]) and torch.equal(columns, own["columns"])
    inside = bool(((counts >= 0) & (counts <= inputs)).all()) and bool(((columns >= 0) & (columns < inputs)).all())
    if not whole or not inside or int(counts.sum()) != len(values):
        raise FormatError(
            f"a sparse update's counts and columns do not place its {len(values)} values in rows of {inputs}; "
            "copy the delta again"
        )
    rows = torch.repeat_interleave(counts.flatten())
    flat = values.new_zeros(counts.numel() * inputs).index_put((rows * inputs + columns,), values, accumulate=True)
    return flat.view(*counts.shape, inputs)


def low_rank(changes: Tensor) -> LowRank:
    """S [L, N, K] as A [L, R, K] and B [L, R, N]: one of the two picks, the other holds the rows or columns picked."""
    held = changes.detach() != 0
    by_row, by_column = held.any(2), held.any(1)
    rows, columns = (int(picked.sum(1).max()) for picked in (by_row, by_column))
    if rows <= columns:
        b = _picking(by_row, rows, changes)
        a = b @ changes
    else:
        a = _picking(by_column, columns, changes)
        b = a @ changes.transpose(1, 2)
    layers = tuple(by_row.any(1).nonzero().flatten().tolist())
    return LowRank(a, b, layers=None if len(layers) == len(changes) else layers)


def _picking(picked: Tensor, most: int, like: Tensor) -> Tensor:
    """Unit vectors [L, R, width] of what is picked [L, width]; zeros where a layer has fewer than R = ``most``."""
    layers, places = picked.nonzero(as_tuple=True)
    units = like.new_zeros(len(picked), most, picked.shape[1])
    units[layers, (picked.cumsum(1) - 1)[layers, places], places] = 1.0
    return units


def effects(spec: Sparse, tensors: Tensors, anatomy: Anatomy) -> Effects:
    """One low-rank update a target slot."""
    found = {}
    for name in spec.targets:
        own = {part: tensors[f"{name}.{part}"] for part in ("counts", "columns", "values")}
        found[name] = low_rank(matrices(own, anatomy.slot(name).inputs))
    return Effects(low_rank=found)


def unpacked(spec: Sparse, tensors: Tensors, anatomy: Anatomy) -> int:
    """Bytes of the low-rank updates: up to twice the base's own matrices, however few entries there are."""
    updates = effects(spec, tensors, anatomy).low_rank.values()
    return sum(side.numel() * side.element_size() for update in updates for side in (update.a, update.b))


SPARSE = Kind("sparse", Sparse, init, effects, unpacked=unpacked)
