"""Torch references of the delta updates over segments of packed rows.

A batch is T token rows; a segment is a half-open row range that one delta owns. Pools hold one row per rank (or
bottleneck unit) of one delta, so ranks mix without padding. These functions are what the fused kernels are compared
with, and what runs where there is no kernel. Gradients flow through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Rows ``lo`` to ``hi`` of the batch use pool rows ``first`` to ``last``; ``bias`` is one more pool row, whose
    coefficient is 1 (-1: none). ``dropout`` acts on the update's input, in training only. ``activation`` is that of
    a bottleneck adapter.
    """

    lo: int
    hi: int
    first: int
    last: int
    bias: int = -1
    dropout: float = 0.0
    activation: str = ""


def add_low_rank(
    y: Tensor, x: Tensor | None, a_pool: Tensor | None, b_pool: Tensor, segments: Sequence[RowSegment]
) -> Tensor:
    """``y[rows] += (x[rows] a_poolᵀ) b_pool`` over the active pool rows, and the bias rows.

    y [T, N] (changed in place, unless gradients are being recorded), x [T, K] or ``None`` where a slot has biases
    only, a_pool [P, K], b_pool [P, N]. Returns y [T, N].
    """
    recording = torch.is_grad_enabled()
    for segment in segments:
        rows = slice(segment.lo, segment.hi)
        mine = y[rows]
        if segment.last > segment.first and x is not None and a_pool is not None:
            a, b = a_pool[segment.first : segment.last], b_pool[segment.first : segment.last]
            source = F.dropout(x[rows], segment.dropout) if segment.dropout else x[rows]
            mine = torch.addmm(mine, source @ a.T, b) if recording else mine.addmm_(source @ a.T, b)
        if segment.bias >= 0:
            mine = mine + b_pool[segment.bias] if recording else mine.add_(b_pool[segment.bias])
        if recording:
            y = with_rows(y, segment.lo, segment.hi, mine)
    return y


def with_rows(y: Tensor, lo: int, hi: int, rows: Tensor) -> Tensor:
    """y [T, N] with rows ``lo`` to ``hi`` replaced; in place only where no gradients are being recorded."""
    if lo == 0 and hi == y.shape[0]:
        return rows
    if torch.is_grad_enabled():
        return torch.cat([y[:lo], rows, y[hi:]])
    y[lo:hi] = rows
    return y


def bottleneck(source: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, segment: RowSegment) -> Tensor:
    """``act(source Dᵀ + b_d) U + b_u`` for one segment's rows.

    source [n, H]; pools down [P, H], down_bias [P, 1], up [P, H]; the row ``segment.bias`` of ``up`` is b_u.
    Returns [n, H].
    """
    rows = slice(segment.first, segment.last)
    hidden = torch.addmm(down_bias[rows, 0], source, down[rows].T)
    return torch.addmm(up[segment.bias], ACTIVATIONS[segment.activation](hidden), up[rows])
