"""Attention over packed rows in one launch: torch's variable-length attention (FlashAttention 2), on a GPU in 16 bits.

Dao 2023, "FlashAttention-2". Sequences are told apart by cumulative lengths; a sequence's prefix stands before its own
keys and values, so that keys may be longer than queries.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.encoder.packing import PackedBatch

HALVES = (torch.float16, torch.bfloat16)
WIDEST = 256


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


def extents(batch: PackedBatch) -> Extents:
    """The extents of a packed batch, on its device."""
    device, lengths = batch.ids.device, np.array(batch.lengths)
    virtual = np.array([entry.prefix_length for entry in batch.entries])
    rows = _cumulative(lengths)
    if not virtual.any():
        edges = torch.from_numpy(rows).to(device)
        return Extents(edges, edges, int(lengths.max()), int(lengths.max()))
    keys, past = _cumulative(lengths + virtual), _cumulative(virtual)
    at = [
        piece
        for i in range(batch.sequences)
        for piece in (np.arange(past[i], past[i + 1]), past[-1] + np.arange(rows[i], rows[i + 1]))
    ]
    owned = [np.arange(e.rows[PREFIX].first, e.rows[PREFIX].last) for e in batch.entries if PREFIX in e.rows]
    return Extents(
        torch.from_numpy(rows).to(device),
        torch.from_numpy(keys).to(device),
        int(lengths.max()),
        int((lengths + virtual).max()),
        torch.from_numpy(np.concatenate(owned)).to(device),
        torch.from_numpy(np.concatenate(at).astype(np.int64)).to(device),
    )


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

    query, key, value [T, heads, D]; ``prefix`` are the pools [P, H]. Returns [T, heads * D].
    """
    if prefix is not None and extents.prefix is not None and extents.keys_at is not None:
        past = [pool.index_select(0, extents.prefix).view(-1, *key.shape[1:]) for pool in prefix]
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
