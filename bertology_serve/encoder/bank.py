"""The delta bank: the rows of all resident deltas, in one pool a place.

A pool's tensors are ``[L, P, width]``: one row per rank, bias, bottleneck unit, prompt or prefix vector of one delta,
the same row numbers in every layer. A delta is an extent of rows in each pool that it uses (its ``Entry``). Pools grow
by half; freed extents are reused. Row 0 is zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bertology_serve.errors import Unsupported
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kinds.effects import Effects, PrefixEffect, PromptEffect
from bertology_serve.kinds.slots import Anatomy

PROMPT, PREFIX = "prompt", "prefix"
Rows = dict[str, Tensor]  # column name -> [L, n, width]


def adapter(place: str) -> str:
    """The name of the pool of the bottleneck adapters at a slot."""
    return f"{place}.adapter"


def scale(slot: str) -> str:
    """The name of the pool of the factors on a slot's outputs."""
    return f"{slot}.scale"


def inner(slot: str) -> str:
    """The name of the pool of the factors on a slot's inputs."""
    return f"{slot}.inner"


def is_adapter(pool: str) -> bool:
    """Whether a pool holds bottleneck adapters."""
    return pool.endswith(".adapter")


@dataclass(frozen=True)
class BankEntry:
    """Where one delta stands in the pools.

    ``rows`` maps a pool's name to the segment template (pool rows ``first``..``last``, bias row, dropout, activation)
    that its sequences get; ``layers`` the layers in which they are active, for pools where these are not all.
    Below ``lowest`` a sequence's rows are those of the bare encoder.
    """

    key: str
    rows: Mapping[str, RowSegment] = field(default_factory=dict)
    layers: Mapping[str, frozenset[int]] = field(default_factory=dict)
    prompt: PromptEffect | None = None
    prefix: PrefixEffect | None = None
    lowest: int = 0

    @property
    def prompt_length(self) -> int:
        """V of the soft prompt, 0 without one."""
        return self._extent(PROMPT)

    @property
    def prefix_length(self) -> int:
        """V of the prefix, 0 without one."""
        return self._extent(PREFIX)

    def _extent(self, pool: str) -> int:
        return self.rows[pool].last - self.rows[pool].first if pool in self.rows else 0


NEVER = sys.maxsize
"""The lowest layer that changes where none does."""
BARE = BankEntry("", lowest=NEVER)


def pool_rows(effects: Effects) -> tuple[dict[str, Rows], dict[str, RowSegment], dict[str, frozenset[int]]]:
    """The rows that a delta puts into each pool, with segment templates counted from row 0 of those rows."""
    rows: dict[str, Rows] = {}
    templates: dict[str, RowSegment] = {}
    for slot in effects.low_rank.keys() | effects.bias.keys():
        rows[slot], templates[slot] = _slot_rows(effects, slot)
    for place, unit in effects.bottleneck.items():
        width = unit.down.shape[1]
        one = unit.up_bias.unsqueeze(1)
        rows[adapter(place)] = {
            "down": torch.cat([unit.down, torch.zeros_like(one)], 1),
            "down_bias": torch.cat([unit.down_bias, unit.down_bias.new_zeros(one.shape[0], 1)], 1).unsqueeze(2),
            "up": torch.cat([unit.up, one], 1),
        }
        templates[adapter(place)] = RowSegment(0, 0, 0, width, bias=width, activation=unit.activation)
    for name, stacks in ((scale, effects.scale), (inner, effects.inner)):
        for slot, factors in stacks.items():
            rows[name(slot)], templates[name(slot)] = {"g": factors.unsqueeze(1)}, RowSegment(0, 0, 0, 0, bias=0)
    if effects.prompt:
        rows[PROMPT] = {"v": effects.prompt.vectors.unsqueeze(0)}
        templates[PROMPT] = RowSegment(0, 0, 0, effects.prompt.vectors.shape[0])
    if effects.prefix:
        rows[PREFIX] = {"k": effects.prefix.keys, "v": effects.prefix.values}
        templates[PREFIX] = RowSegment(0, 0, 0, effects.prefix.keys.shape[1])
    layers = {adapter(place): frozenset(unit.layers) for place, unit in effects.bottleneck.items()}
    return rows, templates, layers


def _slot_rows(effects: Effects, slot: str) -> tuple[Rows, RowSegment]:
    """Rank rows first, then the bias row, whose A is zero."""
    update, shift = effects.low_rank.get(slot), effects.bias.get(slot)
    if update is None:
        assert shift is not None
        return {"b": shift.unsqueeze(1)}, RowSegment(0, 0, 0, 0, bias=0)
    rank = update.a.shape[1]
    if shift is None:
        return {"a": update.a, "b": update.b}, RowSegment(0, 0, 0, rank, dropout=update.dropout)
    row = update.a.new_zeros(update.a.shape[0], 1, update.a.shape[2])
    columns = {"a": torch.cat([update.a, row], 1), "b": torch.cat([update.b, shift.unsqueeze(1)], 1)}
    return columns, RowSegment(0, 0, 0, rank, bias=rank, dropout=update.dropout)


def _moved(template: RowSegment, by: int, training: bool = False) -> RowSegment:
    bias = template.bias + by if template.bias >= 0 else -1
    dropout = template.dropout if training else 0.0
    return replace(template, first=template.first + by, last=template.last + by, bias=bias, dropout=dropout)


def _entry(key: str, effects: Effects, parts: tuple[dict[str, RowSegment], dict[str, frozenset[int]]]) -> BankEntry:
    return BankEntry(key, parts[0], parts[1], effects.prompt, effects.prefix)


def _held(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in a type; Unsupported where one of them is too large for it: it would be infinite."""
    cast = rows.to(dtype)
    if cast.dtype != rows.dtype and not cast.isfinite().all():
        largest, most = rows.abs().max().item(), torch.finfo(dtype).max
        name = str(dtype).removeprefix("torch.")
        raise Unsupported(f"a value of {largest:.3g} is too large for {name} ({most:.3g}); serve the delta in float32")
    return cast


class RowPool:
    """Growing tensors ``[L, P, width]`` of one place, with extents of rows handed out and taken back."""

    def __init__(self, columns: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        """``columns`` maps a column's name to (L, width)."""
        self.capacity = 16
        self.free: list[tuple[int, int]] = [(1, self.capacity)]
        self.columns = {
            name: torch.zeros(depth, self.capacity, width, dtype=dtype, device=device)
            for name, (depth, width) in columns.items()
        }

    def put(self, rows: Rows) -> int:
        """Copies rows [L, n, width] into a free extent and returns its first row; columns not given hold zeros.

        The extent is given back where copying fails.
        """
        count = _height(rows)
        first = self._take(count)
        try:
            for name, column in self.columns.items():
                target = column[:, first : first + count]
                if name in rows:
                    target.copy_(_held(rows[name], target.dtype))
                else:
                    target.zero_()
        except BaseException:
            self.drop(first, count)
            raise
        return first

    def drop(self, first: int, count: int) -> None:
        """Zeroes an extent and gives it back."""
        for column in self.columns.values():
            column[:, first : first + count].zero_()
        merged: list[tuple[int, int]] = []
        for lo, hi in sorted([*self.free, (first, first + count)]):
            if merged and merged[-1][1] == lo:
                merged[-1] = (merged[-1][0], hi)
            else:
                merged.append((lo, hi))
        self.free = merged

    def _take(self, count: int) -> int:
        for i, (lo, hi) in enumerate(self.free):
            if hi - lo >= count:
                self.free[i : i + 1] = [(lo + count, hi)] if hi - lo > count else []
                return lo
        self._grow(count)
        return self._take(count)

    def _grow(self, count: int) -> None:
        old, capacity = self.capacity, self.capacity + max(self.capacity // 2, count)
        bigger = {}
        for name, column in self.columns.items():
            bigger[name] = column.new_zeros(column.shape[0], capacity, column.shape[2])
            bigger[name][:, :old] = column
        self.columns, self.capacity = bigger, capacity  # all at once: memory may run out before
        if self.free and self.free[-1][1] == old:
            self.free[-1] = (self.free[-1][0], self.capacity)
        else:
            self.free.append((old, self.capacity))


class DeltaBank:
    """The resident deltas of one encoder. Not thread-safe: the owner of the encoder serialises changes and runs."""

    def __init__(self, anatomy: Anatomy, dtype: torch.dtype, device: torch.device) -> None:
        self.anatomy, self.dtype, self.device = anatomy, dtype, device
        self.pools: dict[str, RowPool] = {}
        self.entries: dict[str, BankEntry] = {}
        self._extents: dict[str, list[tuple[str, int, int]]] = {}

    @torch.no_grad()
    def add(self, key: str, effects: Effects, lowest: int = 0) -> BankEntry:
        """Makes a delta resident under ``key``, replacing one of that key. Where that fails, nothing has changed.

        ``lowest`` is the entry's. Raises Unsupported for values that the bank's type cannot hold.
        """
        rows, templates, layers = pool_rows(effects)
        extents: list[tuple[str, int, int]] = []
        known = set(self.pools)
        try:
            for name, columns in rows.items():
                if name not in self.pools:
                    self.pools[name] = RowPool(self._columns(name, columns), self.dtype, self.device)
                extents.append((name, self.pools[name].put(columns), _height(columns)))
        except BaseException:
            self._free(extents)
            self.pools = {name: pool for name, pool in self.pools.items() if name in known}
            raise
        self.remove(key)
        self._extents[key] = extents
        moved = {name: _moved(templates[name], first) for name, first, _ in extents}
        self.entries[key] = replace(_entry(key, effects, (moved, layers)), lowest=lowest)
        return self.entries[key]

    def remove(self, key: str) -> None:
        """Frees a delta's rows; unknown keys are fine."""
        self.entries.pop(key, None)
        self._free(self._extents.pop(key, ()))

    def layer(self, pool: str, column: str, layer: int) -> Tensor:
        return self.pools[pool].columns[column][layer]

    def cast(self, dtype: torch.dtype) -> None:
        """From now on rows are of that type, those that are there too; Unsupported for one that it cannot hold."""
        pools = self.pools.values()
        cast = [{name: _held(column, dtype) for name, column in pool.columns.items()} for pool in pools]
        for pool, columns in zip(pools, cast, strict=True):
            pool.columns = columns
        self.dtype = dtype

    def depth(self, pool: str) -> int:
        """L of a pool."""
        return next(iter(self.pools[pool].columns.values())).shape[0]

    def places(self, pool: str) -> tuple[tuple[object, ...], ...]:
        """Where each of a pool's tensors and of its layers lies: (address, shape, strides); others once it has grown.

        The address alone would not do: a pool of another height at the same one has its layers elsewhere.
        """
        columns = self.pools[pool].columns.values()
        return tuple((column.data_ptr(), tuple(column.shape), column.stride()) for column in columns)

    @property
    def bytes(self) -> int:
        tensors = [column for pool in self.pools.values() for column in pool.columns.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _free(self, extents: Iterable[tuple[str, int, int]]) -> None:
        for name, first, count in extents:
            self.pools[name].drop(first, count)

    def _columns(self, name: str, rows: Rows) -> dict[str, tuple[int, int]]:
        """Column sizes of a pool: linear slots always have an A column, whoever comes first."""
        sizes = {column: (tensor.shape[0], tensor.shape[2]) for column, tensor in rows.items()}
        slot = self.anatomy.slots.get(name)
        if slot is not None and slot.inputs:
            sizes["a"] = (slot.depth, slot.inputs)
        return sizes


class LiveBank:
    """A bank whose rows are the deltas' own tensors, so that gradients reach them. Made anew for every step.

    With ``training`` the updates' inputs are dropped at the rate that each delta asks for. Updates of some layers are
    active there alone, so that no graph is built below the lowest.
    """

    def __init__(self, effects: Sequence[tuple[str, Effects]], training: bool = False) -> None:
        self.entries: dict[str, BankEntry] = {}
        pieces: dict[str, list[Rows]] = {}
        heights: dict[str, int] = {}
        for key, effect in effects:
            rows, templates, layers = pool_rows(effect)
            layers |= update_layers(effect)
            moved = {name: _moved(row, heights.get(name, 0), training) for name, row in templates.items()}
            self.entries[key] = _entry(key, effect, (moved, layers))
            for name, columns in rows.items():
                pieces.setdefault(name, []).append(columns)
                heights[name] = heights.get(name, 0) + _height(columns)
        self._layers = {name: _unbound(parts) for name, parts in pieces.items()}

    def layer(self, pool: str, column: str, layer: int) -> Tensor:
        return self._layers[pool][column][layer]


def update_layers(effects: Effects) -> dict[str, frozenset[int]]:
    """The layers of low ranks, biases and factors that are not in all of them."""
    pools = {slot: slot for slot in effects.low_rank.keys() | effects.bias.keys()}
    pools |= {scale(slot): slot for slot in effects.scale} | {inner(slot): slot for slot in effects.inner}
    spans = ((pool, effects.changed(slot)) for pool, slot in pools.items())
    return {pool: frozenset(layers) for pool, layers in spans if layers is not None}


def _unbound(parts: list[Rows]) -> dict[str, tuple[Tensor, ...]]:
    """Several deltas' rows as one pool, split by layer once: cheaper to differentiate than slicing layer by layer."""
    names = {name: part[name] for part in parts for name in part}
    columns = {}
    for name, sample in names.items():
        stacks = [
            part[name] if name in part else sample.new_zeros(sample.shape[0], _height(part), sample.shape[2])
            for part in parts
        ]
        columns[name] = (torch.cat(stacks, 1) if len(stacks) > 1 else stacks[0]).unbind(0)
    return columns


def _height(rows: Rows) -> int:
    return next(iter(rows.values())).shape[1]
