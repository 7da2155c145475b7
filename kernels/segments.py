"""Torch references of the delta updates over segments of packed rows.

A batch is T token rows; a segment is a half-open row range that one delta owns. Pools hold one row per rank (or
bottleneck unit) of one delta, so ranks mix without padding. These functions are what the fused kernels are compared
with, and what runs where there is no kernel. Gradients flow through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    if torch.is_grad_enabled():
        return _recorded(y, x, a_pool, b_pool, segments)
    for segment in segments:
        mine = y[segment.lo : segment.hi]
        if segment.last > segment.first and x is not None and a_pool is not None:
            a, b = a_pool[segment.first : segment.last], b_pool[segment.first : segment.last]
            mine.addmm_(dropped(x[segment.lo : segment.hi], segment) @ a.T, b)
        if segment.bias >= 0:
            mine.add_(b_pool[segment.bias])
    return y


@dataclass(frozen=True)
class SegmentGroup:
    """Neighbouring segments as one product over rows ``lo`` to ``hi``, n of them: pool rows ``columns`` [R], ``owned``
    [n, R] by which rows, and ``biases`` [n, R] of 1 where a row takes its bias.

    What a row does not own is set to 0, not multiplied by it: another delta's infinity is not its own. So pools must
    be finite.
    """

    lo: int
    hi: int
    columns: Tensor
    owned: Tensor
    biases: Tensor

    @classmethod
    def of(cls, segments: Sequence[RowSegment], dtype: torch.dtype) -> SegmentGroup:
        """``segments`` in the order of their rows."""
        lo, hi = segments[0].lo, segments[-1].hi
        columns = [[*range(s.first, s.last), *([s.bias] if s.bias >= 0 else ())] for s in segments]
        biases, at = torch.zeros(hi - lo, sum(map(len, columns)), dtype=dtype), 0
        owned = torch.zeros_like(biases, dtype=torch.bool)
        for segment, own in zip(segments, columns, strict=True):
            rows, ranks = slice(segment.lo - lo, segment.hi - lo), segment.last - segment.first
            owned[rows, at : at + ranks] = True
            biases[rows, at + ranks : at + len(own)] = 1
            at += len(own)
        return cls(lo, hi, torch.tensor([column for own in columns for column in own]), owned, biases)

    def add(self, y: Tensor, x: Tensor | None, a_pool: Tensor | None, b_pool: Tensor) -> None:
        """The updates of ``add_low_rank``, in place."""
        coefficients = self.biases
        if x is not None and a_pool is not None:
            a = a_pool.index_select(0, self.columns)
            coefficients = torch.where(self.owned, x[self.lo : self.hi] @ a.T, self.biases)
        y[self.lo : self.hi].addmm_(coefficients, b_pool.index_select(0, self.columns))


def grouped(segments: Sequence[RowSegment], width: int, most: int, dtype: torch.dtype) -> list[SegmentGroup]:
    """Neighbouring segments together, as long as a group's rows × columns × ``width`` stay below ``most``.

    A product of a few ranks costs a call, hardly its arithmetic; one over rows that own few of its columns is in vain.
    """
    parts: list[list[RowSegment]] = []
    columns = 0
    for segment in segments:
        own = segment.last - segment.first + (segment.bias >= 0)
        if parts and (segment.hi - parts[-1][0].lo) * (columns + own) * width <= most:
            parts[-1].append(segment)
            columns += own
        else:
            parts.append([segment])
            columns = own
    return [SegmentGroup.of(part, dtype) for part in parts]


def dropped(rows: Tensor, segment: RowSegment) -> Tensor:
    """A segment's rows of the update's input, after dropout."""
    return F.dropout(rows, segment.dropout) if segment.dropout else rows


def _recorded(
    y: Tensor, x: Tensor | None, a_pool: Tensor | None, b_pool: Tensor, segments: Sequence[RowSegment]
) -> Tensor:
    """``add_low_rank`` while gradients are recorded: rows are split once and joined once, whatever the segments."""
    segments = [segment for segment in segments if segment.hi > segment.lo]
    sizes, owners = cuts(y.shape[0], segments)
    pieces = list(torch.split(y, sizes))
    sources = torch.split(x, sizes) if x is not None and a_pool is not None else None
    for segment, at in zip(segments, owners, strict=True):
        if segment.last > segment.first and sources is not None and a_pool is not None:
            a, b = a_pool[segment.first : segment.last], b_pool[segment.first : segment.last]
            pieces[at] = torch.addmm(pieces[at], dropped(sources[at], segment) @ a.T, b)
        if segment.bias >= 0:
            pieces[at] = pieces[at] + b_pool[segment.bias]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def add_scaled(y: Tensor, source: Tensor, pool: Tensor, segments: Sequence[RowSegment]) -> Tensor:
    """``y[rows] += source[rows] * pool[bias]`` for every segment: y and source [T, N], pool [P, N].

    y is changed in place, unless gradients are being recorded, and may be the source.
    """
    segments = [segment for segment in segments if segment.hi > segment.lo]
    if not torch.is_grad_enabled():
        for segment in segments:
            rows = slice(segment.lo, segment.hi)
            y[rows].addcmul_(source[rows], pool[segment.bias])
        return y
    sizes, owners = cuts(y.shape[0], segments)
    pieces, sources = list(torch.split(y, sizes)), torch.split(source, sizes)
    for segment, at in zip(segments, owners, strict=True):
        pieces[at] = torch.addcmul(pieces[at], sources[at], pool[segment.bias])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def cuts(rows: int, segments: Sequence[RowSegment]) -> tuple[list[int], list[int]]:
    """Sizes of the pieces that ``rows`` fall into at the bounds of disjoint segments, and each segment's piece."""
    bounds = sorted({0, rows, *(segment.lo for segment in segments), *(segment.hi for segment in segments)})
    at = {lo: piece for piece, lo in enumerate(bounds)}
    return [hi - lo for lo, hi in pairwise(bounds)], [at[segment.lo] for segment in segments]


def bottleneck(source: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, segment: RowSegment) -> Tensor:
    """``act(source Dᵀ + b_d) U + b_u`` for one segment's rows.

    source [n, H]; pools down [P, H], down_bias [P, 1], up [P, H]; the row ``segment.bias`` of ``up`` is b_u.
    Returns [n, H].
    """
    rows = slice(segment.first, segment.last)
    hidden = torch.addmm(down_bias[rows, 0], source, down[rows].T)
    return torch.addmm(up[segment.bias], ACTIVATIONS[segment.activation](hidden), up[rows])
