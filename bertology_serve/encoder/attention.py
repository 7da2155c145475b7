"""Attention over packed rows: each sequence sees itself and its delta's prefix.

Rows are brought into groups of sequences of equal length (one gather a layer), and each group is one call of torch's
scaled dot product attention. Nothing is padded and no [T, T] mask is made. On a GPU one launch does all groups, where
torch can (``varlen``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.kernels.dispatch import HostPath


@dataclass(frozen=True)
class Group:
    """``count`` sequences of ``length`` rows each: rows ``lo`` to ``hi`` of the grouped order.

    ``sequences`` are their numbers in the packed batch; ``prefix`` [count * V] pool rows of their prefixes.
    """

    lo: int
    hi: int
    count: int
    length: int
    sequences: tuple[int, ...]
    prefix: Tensor | None


@dataclass(frozen=True)
class AttentionLayout:
    """``permutation`` [T] brings packed rows into the grouped order, ``inverse`` back (``None``: same order).

    ``extents`` is what attention in one launch needs, on a GPU.
    """

    permutation: Tensor | None
    inverse: Tensor | None
    groups: tuple[Group, ...]
    extents: Extents | None = None


# bias(sequences, q, k) -> [count, heads, length, length], added to the scaled scores
Bias = Callable[[Sequence[int], Tensor, Tensor], Tensor]

# attend(group, q, k, v, mask, scale) -> [count, heads, length, D], in place of torch's attention. q [count, heads,
# length, D]; k, v with the prefix's rows first; mask is boolean, added to the scaled scores, or None. For analyses.
Attend = Callable[[Group, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def make_layout(batch: PackedBatch) -> AttentionLayout:
    """Groups a packed batch's sequences by length and prefix length."""
    device = batch.ids.device
    members: dict[tuple[int, int], list[int]] = {}
    for i, entry in enumerate(batch.entries):
        members.setdefault((batch.lengths[i], entry.prefix_length), []).append(i)
    starts = np.array(batch.starts)
    groups, pieces, at = [], [], 0
    for (length, virtual), sequences in members.items():
        pieces.append((starts[sequences][:, None] + np.arange(length)).reshape(-1))
        count = len(sequences)
        prefix = _prefix_rows(batch, sequences, device) if virtual else None
        groups.append(Group(at, at + count * length, count, length, tuple(sequences), prefix))
        at += count * length
    order = np.concatenate(pieces)
    one_launch = extents(batch) if device.type == "cuda" else None
    if (order == np.arange(at)).all():
        return AttentionLayout(None, None, tuple(groups), one_launch)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(at)
    back = torch.from_numpy(inverse).to(device)
    return AttentionLayout(torch.from_numpy(order).to(device), back, tuple(groups), one_launch)


def _prefix_rows(batch: PackedBatch, sequences: list[int], device: torch.device) -> Tensor:
    extents = [batch.entries[i].rows[PREFIX] for i in sequences]
    return torch.from_numpy(np.concatenate([np.arange(e.first, e.last) for e in extents])).to(device)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    window: int | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    bias: Bias | None = None,
    dropout: float = 0.0,
    attend: Attend | None = None,
) -> Tensor:
    """Attention of every row to its own sequence and prefix.

    query, key, value [T, heads, D], the latter two of fewer heads where queries share them; ``prefix`` are the pools
    [P, their heads * D or more] of keys and values; ``window`` lets a row see only rows at most that far away (prefixes
    are always seen); ``attend`` takes the place of torch's attention.
    Returns [T, heads * D].
    """
    special = bias is not None or dropout > 0 or attend is not None or (window is not None and prefix is not None)
    if layout.extents is not None and not special and fits(query):
        return varlen_attention(query, key, value, layout.extents, scale=scale, window=window, prefix=prefix)
    if not layout.groups:
        raise HostPath("attention group by group is not recorded")
    if layout.permutation is not None:
        query, key, value = (rows.index_select(0, layout.permutation) for rows in (query, key, value))
    outputs = [
        _group_attention(group, query, key, value, scale, window, prefix, bias, dropout, attend)
        for group in layout.groups
    ]
    grouped = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return grouped if layout.inverse is None else grouped.index_select(0, layout.inverse)


def _group_attention(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None,
    bias: Bias | None,
    dropout: float,
    attend: Attend | None,
) -> Tensor:
    heads, width = query.shape[1:]
    q, k, v = (
        rows[group.lo : group.hi].view(group.count, group.length, -1, width).transpose(1, 2)
        for rows in (query, key, value)
    )
    mask = _window_mask(group.length, window, q.device)
    if bias is not None:
        scores = bias(group.sequences, q, k)
        mask = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    if group.prefix is not None and prefix is not None:
        own = [pool[:, : k.shape[1] * width].index_select(0, group.prefix) for pool in prefix]
        past = [rows.view(group.count, -1, k.shape[1], width).transpose(1, 2) for rows in own]
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if mask is not None:
            mask = F.pad(mask, (past[0].shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    k, v = repeated(k, heads, 1), repeated(v, heads, 1)
    if attend is not None:
        out = attend(group, q, k, v, mask, scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).reshape(group.count * group.length, heads * width)


def repeated(rows: Tensor, heads: int, dim: int) -> Tensor:
    """Keys or values for as many heads as there are queries of: where fewer were made, several share each (grouped
    queries, Ainslie et al. 2023, arXiv 2305.13245)."""
    return rows if rows.shape[dim] == heads else rows.repeat_interleave(heads // rows.shape[dim], dim)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[length, length], true where a row may look; ``None`` where it may look everywhere."""
    if window is None or window >= length - 1:
        return None
    at = torch.arange(length, device=device)
    return (at[:, None] - at[None, :]).abs() <= window


HALVES = (torch.float16, torch.bfloat16)
WIDEST = 256


@dataclass(frozen=True)
class Room:
    """What a recorded batch has room for: rows, sequences, prefix rows, the longest sequence (with a prefix)."""

    rows: int
    sequences: int
    prefix: int
    longest_row: int
    longest_key: int


@dataclass(frozen=True)
class Extents:
    """Cumulative lengths, int32 [S + 1], of the sequences' rows and of their keys, with the longest of each.

    Where there are prefixes, ``prefix`` [V] are the pool rows of all of them, and ``keys_at`` [V + T] brings those
    rows, followed by the batch's, into the order of the keys.
    """

    rows: Tensor
    keys: Tensor
    longest_row: int
    longest_key: int
    prefix: Tensor | None = None
    keys_at: Tensor | None = None

    def copy_(self, other: Extents) -> None:
        """Takes over another batch's extents, made for the same room."""
        for name in ("rows", "keys", "prefix", "keys_at"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)


@cache
def _torch_varlen() -> Any:
    """torch's function, ``None`` where this torch has none that scales and looks through windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys() else None


def fits(query: Tensor) -> bool:
    """Whether queries [T, heads, D] can go this way: on a GPU, in 16 bits, with no gradients recorded."""
    return (
        query.is_cuda
        and query.dtype in HALVES
        and query.shape[-1] <= WIDEST
        and not torch.is_grad_enabled()
        and _torch_varlen() is not None
    )


def extents(batch: PackedBatch, room: Room | None = None) -> Extents:
    """The extents of a packed batch, on its device; with a room, filler sequences take the rows that are left."""
    lengths, virtual = np.array(batch.lengths), np.array([entry.prefix_length for entry in batch.entries])
    if room is not None:
        lengths, virtual = _filled(lengths, room), _widened(virtual, room.sequences)
    rows, keys, past = _cumulative(lengths), _cumulative(lengths + virtual), _cumulative(virtual)
    longest = (room.longest_row, room.longest_key) if room else (int(lengths.max()), int((lengths + virtual).max()))
    count = room.prefix if room else int(past[-1])
    put = partial(_put, device=batch.ids.device)
    if not count:
        edges = put(rows)
        return Extents(edges, edges, *longest)
    at = [
        piece
        for i in range(len(lengths))
        for piece in (np.arange(past[i], past[i + 1]), count + np.arange(rows[i], rows[i + 1]))
    ]
    owned = [np.arange(e.rows[PREFIX].first, e.rows[PREFIX].last) for e in batch.entries if PREFIX in e.rows]
    prefix, keys_at = np.concatenate(owned), np.concatenate(at)
    if room is not None:
        prefix, keys_at = _widened(prefix, count), _widened(keys_at, count + room.rows)
    return Extents(put(rows), put(keys), *longest, put(prefix.astype(np.int64)), put(keys_at.astype(np.int64)))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extents: Extents,
    *,
    scale: float,
    window: int | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of every row to its own sequence and prefix, as ``packed_attention``; no window beside prefixes.

    query, key, value [T, heads, D]; ``prefix`` are the pools [P, H or more]. Returns [T, heads * D].
    """
    if prefix is not None and extents.prefix is not None and extents.keys_at is not None:
        width = key.shape[1] * key.shape[2]
        past = [pool[:, :width].index_select(0, extents.prefix).view(-1, *key.shape[1:]) for pool in prefix]
        key, value = (
            torch.cat([before, own]).index_select(0, extents.keys_at)
            for before, own in zip(past, (key, value), strict=True)
        )
    key, value = repeated(key, query.shape[1], 1), repeated(value, query.shape[1], 1)
    sides = (-1, -1) if window is None else (window, window)
    out: Tensor = _torch_varlen()(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        extents.rows,
        extents.keys,
        extents.longest_row,
        extents.longest_key,
        scale=scale,
        window_size=sides,
    )
    return out.reshape(query.shape[0], -1)


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], lengths.cumsum()]).astype(np.int32)


def _filled(lengths: np.ndarray, room: Room) -> np.ndarray:
    """The lengths, then filler sequences for the rows that are left, then empty ones."""
    left = room.rows - int(lengths.sum())
    filler = [min(room.longest_row, left - at) for at in range(0, left, room.longest_row)]
    return _widened(np.concatenate([lengths, np.array(filler, dtype=lengths.dtype)]), room.sequences)


def _widened(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(size - len(values), dtype=values.dtype)])


def _put(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
