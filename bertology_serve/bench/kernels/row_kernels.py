"""Kernels that no matrix product hides: bottleneck adapters and LayerNorm, beside a copy of the rows they touch.

They are bound by memory: what they read and write of the batch, moved by a plain copy, is the floor that they are
measured against, in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.bench.kernels.gpu_timing import Spread, compare, sets_needed
from bertology_serve.bench.kernels.workload import Workload, batch_segments
from bertology_serve.errors import VerificationError
from bertology_serve.kernels import dispatch
from bertology_serve.kernels.dispatch import BatchColumns
from bertology_serve.kernels.segments import RowSegment, bottleneck

COPY, OURS, LOOP = "copy", "ours", "torch"
ALLOWED = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
WIDTHS, HEIGHTS, DELTAS, BOTTLENECK = (768, 1024), (4096, 16384), 64, 64


@dataclass(frozen=True)
class RowWork:
    """``kernel`` ("adapter" or "norm") on x [rows, width]: 64 deltas, with a bottleneck of 64 or a bias each."""

    kernel: str
    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class RowFigure:
    """Times of one workload; ``ratio``: ours to the copy. ``error``: relative Frobenius, against float64."""

    work: RowWork
    times: dict[str, Spread]
    error: float

    @property
    def ratio(self) -> float:
        """Ours to the copy."""
        return self.times[OURS].median / self.times[COPY].median


@dataclass(frozen=True)
class Rows:
    """One input set: x [T, H], and pools down [P, H], shift [P, 1], up [P, H]."""

    x: Tensor
    down: Tensor
    shift: Tensor
    up: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.down, self.shift, self.up))


def sweep(dtype: torch.dtype) -> Iterator[RowWork]:
    """What is measured."""
    for kernel in ("adapter", "norm"):
        for width in WIDTHS:
            for height in HEIGHTS:
                yield RowWork(kernel, height, width, dtype)


@torch.inference_mode()
def measure(works: Iterable[RowWork], device: torch.device) -> Iterator[RowFigure]:
    """The figures of each, after a comparison with float64. Raises VerificationError where one is wrong."""
    for work in works:
        segments = segments_of(work)
        first = row_inputs(work, device, 0)
        calls = ways(work, segments, device)
        want = exact(work, first, segments)
        error = float((calls[OURS](first).double() - want).norm() / want.norm())
        if not error <= ALLOWED[work.dtype]:
            raise VerificationError(f"error {error:.2e} against float64 on {work}; no time was taken")
        count = sets_needed(first.bytes, device)
        sets = [first, *(row_inputs(work, device, seed) for seed in range(1, count))]
        yield RowFigure(work, compare(calls, sets), error)


def segments_of(work: RowWork) -> list[RowSegment]:
    """Sequences of 64 deltas, each with the pool rows of its adapter, or its bias alone."""
    units = BOTTLENECK + 1 if work.kernel == "adapter" else 1
    found = batch_segments(Workload(work.width, work.width, work.rows, units, DELTAS))
    activation = "gelu" if work.kernel == "adapter" else ""
    return [replace(s, last=s.last - 1, bias=s.last - 1, activation=activation) for s in found]


def ways(work: RowWork, segments: list[RowSegment], device: torch.device) -> dict[str, Callable[[Rows], Tensor]]:
    """A copy, ours, and torch segment by segment."""
    lists = BatchColumns(work.rows, device)
    if work.kernel == "norm":
        plain = torch.ones(work.width, device=device, dtype=work.dtype)
        ours: Callable[[Rows], Tensor] = lambda i: dispatch.norm(  # noqa: E731
            i.x, plain, None, 1e-12, None, i.up, segments, lists
        )
        return {COPY: lambda i: i.x.clone(), OURS: ours, LOOP: partial(_by_torch, work, segments)}
    return {
        COPY: lambda i: i.x.clone(),
        OURS: lambda i: dispatch.adapters(i.x, i.x, i.down, i.shift, i.up, segments, lists),
        LOOP: partial(_by_torch, work, segments),
    }


def exact(work: RowWork, given: Rows, segments: list[RowSegment]) -> Tensor:
    """The output in float64."""
    return _by_torch(work, segments, Rows(*(t.double() for t in (given.x, given.down, given.shift, given.up))))


def row_inputs(work: RowWork, device: torch.device, seed: int) -> Rows:
    """Random tensors; adapters add about a tenth of x."""
    generator = torch.Generator(device).manual_seed(seed)
    height = 1 + DELTAS * (BOTTLENECK + 1)

    def normal(count: int, width: int, scale: float) -> Tensor:
        return (torch.randn(count, width, generator=generator, device=device) * scale).to(work.dtype)

    h = work.width
    return Rows(normal(work.rows, h, 1.0), normal(height, h, h**-0.5), normal(height, 1, 0.1), normal(height, h, 0.02))


def lines(figures: Iterable[RowFigure]) -> list[str]:
    """The printed table."""
    return ["kernel      T     H    copy us   ours us  torch us   ours/copy   error"] + [
        f"{f.work.kernel:8}{f.work.rows:6}{f.work.width:6}"
        + "".join(f"{f.times[name].median:10.1f}" for name in (COPY, OURS, LOOP))
        + f"{f.ratio:12.3f}{f.error:10.1e}"
        for f in figures
    ]


def _by_torch(work: RowWork, segments: list[RowSegment], i: Rows) -> Tensor:
    if work.kernel == "norm":
        y = F.layer_norm(i.x, i.x.shape[1:], None, None, 1e-12)
        for s in segments:
            y[s.lo : s.hi] += i.up[s.bias]
        return y
    y = i.x.clone()
    for s in segments:
        y[s.lo : s.hi] += bottleneck(i.x[s.lo : s.hi], i.down, i.shift, i.up, s)
    return y
