"""Packed rank columns: which pool rows act on which rows of each M tile of a packed batch.

A batch of T rows is cut into tiles of ``block_m`` rows, whoever owns them. A tile's *columns* are the pool rows that
are active somewhere in it, each with its row range inside the tile. Tiles span requests, ranks mix without padding, a
bias is a column whose coefficient is 1, and a tile without columns is plain base work. The number of tiles depends on T
alone, and one list serves every layer, because a delta has the same pool rows in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bertology_serve.kernels.segments import RowSegment

LO_BITS = 12
KIND_SHIFT = 2 * LO_BITS
MAX_BLOCK_M = (1 << LO_BITS) - 1


def aligned(count: int) -> int:
    """The next multiple of 4: so many int32 end at an address that 16 bytes divide."""
    return -(-count // 4) * 4


class Pools(NamedTuple):
    """One slot's pools in one layer: a [P, K] (``None``: biases only) and b [P, N of the slice]."""

    a: Tensor | None
    b: Tensor


@dataclass(frozen=True)
class TileColumns:
    """The column lists of all tiles, in one int32 tensor so that one copy uploads them.

    ``packed`` holds ``starts [slices * tiles + 1]``, ``rows [C]`` and ``ranges [C]``, each at an address that 16 bytes
    divide: the columns of tile t of slice s
    are ``starts[s * tiles + t]`` to ``starts[s * tiles + t + 1]``. A range is ``lo | hi << 12 | kind << 24``: active
    for the tile's rows lo <= m < hi; kind 1 is a bias. ``bounds`` [slices + 1] are the column numbers at which slices
    begin and end; ``capacity`` C is at least the number in use; ``widest`` is the most columns that
    one tile has, or may have in a graph.
    """

    packed: Tensor
    slices: int
    tiles: int
    block_m: int
    rows: int
    capacity: int
    bounds: tuple[int, ...]
    widest: int

    @property
    def starts(self) -> Tensor:
        """int32 [slices * tiles + 1]."""
        return self.packed[: self.slices * self.tiles + 1]

    @property
    def pool_rows(self) -> Tensor:
        """int32 [C]."""
        return self.packed[aligned(self.slices * self.tiles + 1) :][: self.capacity]

    @property
    def ranges(self) -> Tensor:
        """int32 [C]."""
        return self.packed[aligned(self.slices * self.tiles + 1) + self.capacity :]

    @property
    def count(self) -> int:
        """Columns in use."""
        return self.bounds[-1] - self.bounds[0]

    @property
    def mean(self) -> float:
        """Columns per tile and slice on average."""
        return self.count / (self.slices * self.tiles) if self.tiles else 0.0

    def to(self, device: torch.device) -> TileColumns:
        """The same lists on a device, through pinned memory where that lets the copy run beside other work."""
        source = self.packed.pin_memory() if device.type == "cuda" and not self.packed.is_cuda else self.packed
        return replace(self, packed=source.to(device, non_blocking=True))

    def write_into(self, fixed: TileColumns) -> None:
        """Copies these lists over those of a captured graph, whose addresses and capacity are fixed.

        Raises ValueError where the two differ in anything but their columns, or a tile has more than was reckoned with.
        """
        if self.widest > fixed.widest:
            raise ValueError(f"got a tile of {self.widest} columns, the graph was recorded for {fixed.widest}")
        shape, theirs = self._shape(), fixed._shape()
        if shape != theirs:
            raise ValueError(f"got lists of (slices, tiles, block_m, capacity) {shape}, the graph has {theirs}")
        fixed.packed.copy_(self.packed, non_blocking=True)

    def _shape(self) -> tuple[int, int, int, int]:
        return self.slices, self.tiles, self.block_m, self.capacity


def tile_columns(
    slices: Sequence[Sequence[RowSegment]], rows: int, block_m: int, capacity: int | None = None
) -> TileColumns:
    """The column lists of ``slices`` (the segments of each N slice; one for an ordinary linear) over T = ``rows``.

    ``capacity`` reserves room for that many columns, so that another batch's lists fit the same addresses. Raises
    ValueError for a tile height that ranges cannot hold, and where the columns exceed the capacity.
    """
    if not 0 < block_m <= MAX_BLOCK_M:
        raise ValueError(f"got a tile height of {block_m}, expected 1 to {MAX_BLOCK_M}")
    tiles = -(-rows // block_m)
    table = torch.tensor(
        [(i, s.lo, s.hi, s.first, s.last, s.bias) for i, part in enumerate(slices) for s in part], dtype=torch.int64
    ).view(-1, 6)
    tile, pool_row, packed_range = _expanded(table, block_m, tiles)
    per_tile = torch.bincount(tile, minlength=len(slices) * tiles)
    count = int(tile.numel())
    room = aligned(count if capacity is None else capacity)
    if count > room:
        raise ValueError(f"got {count} columns for a capacity of {room}; use a larger column class")
    starts = torch.cat([per_tile.new_zeros(1), per_tile.cumsum(0)])
    spare = tile.new_zeros(room - count)
    packed = laid_out(starts, torch.cat([pool_row, spare]), torch.cat([packed_range, spare])).to(torch.int32)
    bounds = (0, *starts[tiles::tiles].tolist()) if tiles else (0,) * (len(slices) + 1)
    widest = int(per_tile.max()) if per_tile.numel() else 0
    return TileColumns(packed, len(slices), tiles, block_m, rows, room, bounds, widest)


def laid_out(starts: Tensor, pool_rows: Tensor, ranges: Tensor) -> Tensor:
    """``packed`` of its three parts."""
    gap = starts.new_zeros(aligned(starts.numel()) - starts.numel())
    return torch.cat([starts, gap, pool_rows, ranges])


def _expanded(table: Tensor, block_m: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """(list number, pool row, packed range) of every column, ordered by list; ``table`` [G, 6] int64 of segments."""
    part, lo, hi, first, last, bias = table.unbind(1)
    rank = (last - first).clamp(min=0)
    begin = lo.div(block_m, rounding_mode="floor")
    spans = torch.where(hi > lo, (hi - 1).div(block_m, rounding_mode="floor") - begin + 1, 0)
    segment, step = _repeated(spans)  # one entry per (segment, tile) pair
    tile = begin[segment] + step
    key, order = torch.sort(part[segment] * tiles + tile, stable=True)
    segment, tile = segment[order], tile[order]
    pair, column = _repeated((rank + (bias >= 0))[segment])  # one entry per column of each pair
    owner, at = segment[pair], tile[pair] * block_m
    is_bias = column >= rank[owner]
    pool_row = torch.where(is_bias, bias[owner], first[owner] + column)
    inside_lo = (lo[owner] - at).clamp(min=0)
    inside_hi = (hi[owner] - at).clamp(max=block_m)
    return key[pair], pool_row, inside_lo | (inside_hi << LO_BITS) | (is_bias.long() << KIND_SHIFT)


def _repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts [G]: which g each of the sum(counts) entries belongs to, and its number within g."""
    owner = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return owner, torch.arange(owner.numel()) - before[owner]


def active(columns: TileColumns, part: int, tile: int) -> list[tuple[int, int, int, bool]]:
    """One tile's columns in plain numbers: (pool row, first batch row, last batch row + 1, is a bias)."""
    starts = columns.starts
    lo, hi = int(starts[part * columns.tiles + tile]), int(starts[part * columns.tiles + tile + 1])
    mask, at = MAX_BLOCK_M, tile * columns.block_m
    pairs = zip(columns.pool_rows[lo:hi].tolist(), columns.ranges[lo:hi].tolist(), strict=True)
    return [(row, at + (r & mask), at + (r >> LO_BITS & mask), bool(r >> KIND_SHIFT)) for row, r in pairs]
