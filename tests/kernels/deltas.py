"""Random linears, pools and segments for the kernels' checks, and the error that they are judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertology_serve.kernels.columns import Pools, TileColumns, tile_columns
from bertology_serve.kernels.segments import RowSegment

NAN = float("nan")


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype a check runs, and the relative Frobenius error against float64 that it allows."""

    device: str
    dtype: torch.dtype
    tolerance: float

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def close(self, got: Tensor, want: Tensor) -> None:
        found = error(got, want)
        assert found <= self.tolerance, f"relative error {found:.2e} against float64, allowed {self.tolerance:.0e}"


INTERPRETED = Setting("cpu", torch.float32, 1e-6)
ON_GPU = (
    Setting("cuda", torch.bfloat16, 4e-3),
    Setting("cuda", torch.float16, 6e-4),
    Setting("cuda", torch.float32, 1e-6),
)


@dataclass(frozen=True)
class Request:
    """One delta's part of a batch: so many rows, ranks, and perhaps a bias."""

    rows: int
    rank: int = 0
    bias: bool = False


@dataclass(frozen=True)
class Case:
    """A linear with its batch, in float64: x [T, K], w [N, K], bias [N], one pool and one segment list per slice."""

    x: Tensor
    w: Tensor
    bias: Tensor
    pools: list[Pools]
    slices: list[list[RowSegment]]

    def columns(self, block_m: int, device: str = "cpu") -> TileColumns:
        return tile_columns(self.slices, self.x.shape[0], block_m).to(torch.device(device))

    def cast(self, setting: Setting) -> Case:
        """The same in a setting's dtype, with poison around the rows of x and in pool rows that nobody owns."""
        pools = []
        for pool, segments in zip(self.pools, self.slices, strict=True):
            free = torch.ones(pool.b.shape[0], dtype=torch.bool)
            free[0] = False
            for s in segments:
                free[s.first : s.last] = False
                free[max(s.bias, 0)] = False
            a, b = (None if t is None else t.masked_fill(free[:, None], NAN) for t in pool)
            pools.append(Pools(None if a is None else setting.put(a), setting.put(b)))
        x = surrounded(setting.put(self.x))
        return Case(x, setting.put(self.w), setting.put(self.bias), pools, self.slices)

    def rounded(self, dtype: torch.dtype) -> Case:
        """The same in float64, each number as ``dtype`` holds it: what a kernel in that dtype is compared with."""
        cut = lambda t: t.to(dtype).double()  # noqa: E731
        pools = [Pools(None if p.a is None else cut(p.a), cut(p.b)) for p in self.pools]
        return Case(cut(self.x), cut(self.w), cut(self.bias), pools, self.slices)


def case(requests: Sequence[Sequence[Request]], k: int, n: int, order: Sequence[int] | None = None) -> Case:
    """A random case with one request list per slice of ``n``; pool rows are handed out in ``order``."""
    laid = [segments(part, order) for part in requests]
    tokens, width = sum(r.rows for r in requests[0]), n // len(requests)
    pools = [
        Pools(pool(deltas, height, k, 4 + i, k**-0.5), pool(deltas, height, width, 14 + i, 0.5))
        for i, (deltas, height) in enumerate(laid)
    ]
    weights = normal(n, k, seed=2, scale=k**-0.5)
    return Case(normal(tokens, k, seed=1), weights, normal(n, seed=3), pools, [deltas for deltas, _ in laid])


def segments(requests: Sequence[Request], order: Sequence[int] | None = None) -> tuple[list[RowSegment], int]:
    """The requests' segments, and P: pool row 0 belongs to nobody, nor does the one after each delta."""
    firsts, taken = {}, 1
    for i in order if order is not None else range(len(requests)):
        firsts[i] = taken
        taken += requests[i].rank + requests[i].bias + 1
    found, at = [], 0
    for i, request in enumerate(requests):
        last = firsts[i] + request.rank
        found.append(RowSegment(at, at + request.rows, firsts[i], last, last if request.bias else -1))
        at += request.rows
    return found, taken


def pool(deltas: Sequence[RowSegment], height: int, width: int, seed: int, scale: float) -> Tensor:
    """A pool [P, width] in which a delta's rows depend on its place in the batch, not on its pool rows."""
    out = torch.zeros(height, width, dtype=torch.float64)
    for i, segment in enumerate(deltas):
        count = segment.last - segment.first + (segment.bias >= 0)
        out[segment.first : segment.first + count] = normal(count, width, seed=1000 * seed + i, scale=scale)
    return out


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; NaN anywhere is infinitely wrong."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    value = float((got - want).norm() / want.norm().clamp(min=1e-30))
    return value if value == value else float("inf")


def surrounded(matrix: Tensor) -> Tensor:
    """The same numbers [T, K] inside a larger matrix of NaN."""
    height, width = matrix.shape
    outer = matrix.new_full((height + 3, width + 16), NAN)
    outer[:height, :width] = matrix
    return outer[:height, :width]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` holds NaN, so that what a kernel leaves unwritten shows."""
    plain = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        fresh = plain(*args, **kwargs)
        return fresh.fill_(NAN) if fresh.is_floating_point() else fresh

    torch.empty = empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = plain
