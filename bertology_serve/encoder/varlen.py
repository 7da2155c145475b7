"""Attention over packed rows in one launch: torch's variable-length attention (FlashAttention 2), on a GPU in 16 bits.

Dao 2023, "FlashAttention-2". Sequences are told apart by cumulative lengths; a sequence's prefix stands before its own
keys and values, so that keys may be longer than queries.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.encoder.packing import PackedBatch

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
