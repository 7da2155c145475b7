"""What the encoder's modules see while a batch passes through them, and what they do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bertology_serve.encoder.attention import Attend, Group, Layout
from bertology_serve.encoder.bank import PREFIX, Entry, adapter
from bertology_serve.encoder.packing import PackedBatch
from bertology_serve.encoder.plan import BatchPlan
from bertology_serve.kernels.segments import RowSegment, add_low_rank, bottleneck


class Pools(Protocol):
    """The rows of deltas: the resident ones (``DeltaBank``) or those under training (``LiveBank``)."""

    entries: dict[str, Entry]

    def layer(self, pool: str, column: str, layer: int) -> Tensor:
        """One layer of a pool's column [P, width]."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a wrapped module stands: a slot, a layer, and the columns of its output that the slot names."""

    slot: str
    layer: int
    part: tuple[int, int] | None = None


class Heads(Protocol):
    """Computes attention in place of torch, layer by layer: what analyses watch and gate heads with."""

    def __call__(
        self, layer: int, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """See ``attention.Attend``."""
        ...


@dataclass(frozen=True)
class Pass:
    """One batch on its way through the encoder."""

    batch: PackedBatch
    plan: BatchPlan
    pools: Pools
    layout: Layout | None
    heads: Heads | None = None

    def attend(self, layer: int) -> Attend | None:
        """What takes the place of torch's attention in a layer, if anything."""
        return None if self.heads is None else partial(self.heads, layer)

    def update(self, place: Place, x: Tensor | None, y: Tensor, segments: Sequence[RowSegment] | None = None) -> Tensor:
        """Adds the low ranks and biases of a slot to its output y [T, N], given its input x [T, K]."""
        active = self.plan.segments.get(place.slot) if segments is None else segments
        if not active:
            return y
        ranked = x is not None and any(segment.last > segment.first for segment in active)
        a = self.pools.layer(place.slot, "a", place.layer) if ranked else None
        b = self.pools.layer(place.slot, "b", place.layer)
        if place.part is None:
            return add_low_rank(y, x, a, b, active)
        lo, hi = place.part
        columns = add_low_rank(y[:, lo:hi], x, a, b, active)
        return torch.cat([y[:, :lo], columns, y[:, hi:]], 1) if torch.is_grad_enabled() else y

    def adapters(self, place: Place) -> list[RowSegment]:
        """The row segments that have a bottleneck adapter at this place."""
        name = adapter(place.slot)
        return [
            segment
            for segment, run in zip(self.plan.segments.get(name, ()), self._owners(name), strict=True)
            if place.layer in run.adapter_layers[name]
        ]

    def adapter(self, place: Place, segment: RowSegment, source: Tensor) -> Tensor:
        """``act(source Dᵀ + b_d) U + b_u`` for a segment's rows [n, H]."""
        name, layer = adapter(place.slot), place.layer
        down, down_bias = self.pools.layer(name, "down", layer), self.pools.layer(name, "down_bias", layer)
        return bottleneck(source, down, down_bias, self.pools.layer(name, "up", layer), segment)

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The pools [P, H] of prefix keys and values of a layer, ``None`` where no sequence has a prefix."""
        if PREFIX not in self.plan.segments:
            return None
        return self.pools.layer(PREFIX, "k", layer), self.pools.layer(PREFIX, "v", layer)

    def _owners(self, pool: str) -> list[Entry]:
        return [run.entry for run in self.plan.runs if pool in run.entry.rows]


class Current:
    """Holds the pass that is under way; every wrapped module of an encoder refers to the same one."""

    def __init__(self) -> None:
        self.it: Pass | None = None
