"""Workloads of the kernel benchmark: one linear, one packed batch of sequences, and the deltas that they ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bertology_serve.kernels.columns import Pools
from bertology_serve.kernels.segments import RowSegment

SHAPES = ((768, 768), (768, 2304), (768, 3072), (3072, 768), (1024, 1024), (1024, 3072), (1024, 4096), (4096, 1024))
ROWS = (128, 1024, 4096, 16384, 65536)
MIXES = ("uniform", "distinct", "zipf", "single")
NOBODY = "none"
LENGTHS = ("lognormal", "16", "64", "128")
RANKS_AND_DELTAS = ((16, 1), (16, 8), (16, 64), (16, 1000), (4, 64), (8, 64), (32, 64), (64, 64))
LONGEST, MEDIAN_LENGTH, SPREAD, ZIPF = 512, 64.0, 0.7, 1.5


@dataclass(frozen=True)
class Workload:
    """A point of the sweep: x [rows, k], W [n, k], ``deltas`` resident deltas of rank ``rank``.

    ``mix``: which delta a sequence asks for: any alike, one each, Zipf with exponent 1.5, all the same, or none.
    ``lengths``: rows of a sequence, a number or lognormal with a median of 64 and 512 at most.
    """

    k: int
    n: int
    rows: int
    rank: int = 16
    deltas: int = 64
    mix: str = "uniform"
    lengths: str = "lognormal"
    dtype: str = "bfloat16"


def sweep(quick: bool, dtype: str = "bfloat16") -> Iterator[Workload]:
    """The points that are measured, those that say most first."""
    if quick:
        for k, n in ((768, 768), (768, 3072)):
            for rows in (1024, 16384):
                for deltas in (8, 64):
                    yield Workload(k, n, rows, 16, deltas, dtype=dtype)
        return
    for rank, deltas in RANKS_AND_DELTAS:
        for rows in ROWS:
            for k, n in SHAPES:
                yield Workload(k, n, rows, rank, deltas, dtype=dtype)
    base = Workload(768, 3072, 16384, dtype=dtype)
    for mix in MIXES:
        for lengths in LENGTHS:
            if (mix, lengths) != (base.mix, base.lengths):
                yield replace(base, mix=mix, lengths=lengths)
    yield replace(base, deltas=1000, mix=NOBODY)


def batch_segments(workload: Workload, seed: int = 0) -> list[RowSegment]:
    """The segments of a random batch of that kind: sequences sorted by delta, ``rows`` rows in all."""
    if workload.mix == NOBODY:
        return []
    generator = torch.Generator().manual_seed(seed)
    lengths = _lengths(workload, generator)
    asked = _asked(workload, len(lengths), generator).sort().values.tolist()
    found: list[RowSegment] = []
    at = 0
    for delta, length in zip(asked, lengths, strict=True):
        first = 1 + delta * workload.rank
        if found and found[-1].first == first:
            found[-1] = replace(found[-1], hi=at + length)
        else:
            found.append(RowSegment(at, at + length, first, first + workload.rank))
        at += length
    return found


def pool_height(workload: Workload) -> int:
    """P: row 0 and the rows of all resident deltas (where every sequence has its own: of as many as there are)."""
    if workload.mix == "distinct":
        return max(1 + workload.rank * workload.deltas, batch_segments(workload)[-1].last)
    return 1 + workload.rank * workload.deltas


def _lengths(workload: Workload, generator: torch.Generator) -> list[int]:
    if workload.lengths != "lognormal":
        length = int(workload.lengths)
        whole, rest = divmod(workload.rows, length)
        return [length] * whole + [rest] * bool(rest)
    drawn, left = [], workload.rows
    while left:
        normal = torch.randn(1, generator=generator)
        length = min(left, LONGEST, max(1, round(MEDIAN_LENGTH * float(torch.exp(SPREAD * normal)))))
        drawn.append(length)
        left -= length
    return drawn


def _asked(workload: Workload, sequences: int, generator: torch.Generator) -> Tensor:
    """The delta of each sequence, int64 [sequences]."""
    if workload.mix == "distinct":
        return torch.arange(sequences)
    if workload.mix == "single":
        return torch.zeros(sequences, dtype=torch.int64)
    ranks = torch.arange(1, workload.deltas + 1, dtype=torch.float64)
    weights = ranks**-ZIPF if workload.mix == "zipf" else torch.ones_like(ranks)
    return torch.multinomial(weights, sequences, replacement=True, generator=generator)


@dataclass(frozen=True)
class Inputs:
    """One set of tensors of a workload: x [T, K], w [N, K], bias [N], a [P, K] and b [P, N]."""

    x: Tensor
    w: Tensor
    bias: Tensor
    pools: Sequence[Pools]

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        tensors = [self.x, self.w, self.bias, *(t for pool in self.pools for t in pool if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)


def inputs(workload: Workload, device: torch.device, seed: int) -> Inputs:
    """Random tensors: unit x, W and A that keep the scale, B that makes the update a tenth of the output."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, workload.dtype)

    def normal(height: int, width: int, scale: float) -> Tensor:
        return (torch.randn(height, width, generator=generator, device=device) * scale).to(dtype)

    height = pool_height(workload)
    a, b = normal(height, workload.k, workload.k**-0.5), normal(height, workload.n, 0.1 * workload.rank**-0.5)
    a[0], b[0] = 0.0, 0.0
    x, w = normal(workload.rows, workload.k, 1.0), normal(workload.n, workload.k, workload.k**-0.5)
    return Inputs(x, w, normal(1, workload.n, 1.0)[0], [Pools(a, b)])
