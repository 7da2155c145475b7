"""Shrink and expand as kernels of their own: for high ranks, wide outputs, and as the baseline that others ship.

``segmented_lora_shrink`` writes the coefficients of every tile column; ``linear_lora_epilogue`` is the base linear
whose epilogue reads them. With programmatic dependent launch (Hopper and later) the second starts beside the first and
waits only before its epilogue. ``lora_expand`` adds to an output that another linear has written: together with the
shrink it is the pair that multi-LoRA servers run after cuBLAS (S-LoRA, arXiv 2311.03285; Punica, arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.blocks import (
    Int,
    Ptr,
    b_tile,
    check_dtypes,
    check_matrix,
    column_rows,
    jit,
    jit_any_rows,
    shrunk,
)
from bertology_serve.kernels.columns import Pools, TileColumns
from bertology_serve.kernels.fused_lora_linear import launch_linear, pool_arguments, read_coefficients
from bertology_serve.kernels.tuning import FILLED, Config, cdiv


@jit_any_rows
def shrink_kernel(
    x: Ptr,  # [T, K]
    out: Ptr,  # [SPLITS, C, BM]
    a0: Ptr, a1: Ptr, a2: Ptr,  # [P, K] of each slice
    starts: Ptr,  # int32 [SLICES * tiles + 1]
    rows: Ptr, ranges: Ptr,  # int32 [C]
    T: Int, K: Int, span: Int, capacity: Int, stride_x: Int, stride_a: Int,
    OVERFLOW: tl.constexpr,
    SLICES: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The columns of one tile of one slice over one part of K: RT of them, or, with OVERFLOW, RT at a time."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # the epilogue may start; this kernel itself waits for all before it
    tile = tl.program_id(0)
    part = tl.program_id(1)
    split = tl.program_id(2)
    a = a0
    if SLICES > 1:
        if part == 1:
            a = a1
        if part == 2:
            a = a2
    at = starts + part * tl.cdiv(T, BM) + tile
    first = tl.load(at)
    last = tl.load(at + 1)
    out += split.to(tl.int64) * capacity * BM
    if OVERFLOW:
        for c in range(first, last, RT):
            shrink_chunk(x, out, a, rows, ranges, c, last, tile * BM, split * span, T, K, stride_x, stride_a,
                         span, BIAS, BM, BK, RT, EVEN_K, PRECISION)  # fmt: skip
    elif first < last:
        shrink_chunk(x, out, a, rows, ranges, first, last, tile * BM, split * span, T, K, stride_x, stride_a,
                     span, BIAS, BM, BK, RT, EVEN_K, PRECISION)  # fmt: skip


@jit
def shrink_chunk(
    x: Ptr, out: Ptr, a: Ptr, rows: Ptr, ranges: Ptr, first: Int, last: Int, m0: Int, k0: Int, T: Int, K: Int,
    stride_x: Int, stride_a: Int, span: Int, BIAS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """RT columns from ``first``, written where they belong."""
    row, own = column_rows(rows, ranges, first, last, RT)
    s = shrunk(x, a, row, own, m0, k0, T, K, stride_x, stride_a, span, BM, BK, RT, BIAS, EVEN_K, False, PRECISION)
    column = first + tl.arange(0, RT)
    to = out + column.to(tl.int64)[None, :] * BM + tl.arange(0, BM)[:, None]
    tl.store(to, s.to(out.dtype.element_ty), mask=(column < last)[None, :])


@jit_any_rows
def expand_kernel(
    y: Ptr,  # [T, N], read and written
    coefficients: Ptr,  # [SPLITS, C, BM]
    b0: Ptr, b1: Ptr, b2: Ptr,  # [P, width] of each slice
    starts: Ptr,  # int32 [SLICES * tiles + 1]
    rows: Ptr, ranges: Ptr,  # int32 [C]
    T: Int, width: Int, capacity: Int, stride_y: Int, stride_b: Int,
    SPLITS: tl.constexpr, SLICES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, RT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """``y += s B`` of one tile, BN columns of one slice."""
    tile = tl.program_id(0)
    part = tl.program_id(2)
    b = b0
    if SLICES > 1:
        if part == 1:
            b = b1
        if part == 2:
            b = b2
    at = starts + part * tl.cdiv(T, BM) + tile
    first = tl.load(at)
    last = tl.load(at + 1)
    if first < last:
        m = tl.arange(0, BM)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        for c in range(first, last, RT):
            row, _ = column_rows(rows, ranges, c, last, RT)
            s = read_coefficients(coefficients, c, last, capacity, BM, RT, SPLITS, y.dtype.element_ty)
            acc = tl.dot(s, b_tile(b, row, n, width, stride_b), acc, input_precision=PRECISION)
        to = y + (tile * BM).to(tl.int64) * stride_y + part * width + (m[:, None] * stride_y + n[None, :])
        mask = (m < T - tile * BM)[:, None] & (n < width)[None, :]
        tl.store(to, (tl.load(to, mask=mask, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


def segmented_lora_shrink(
    x: Tensor,
    pools: Sequence[Pools],
    columns: TileColumns,
    config: Config | None = None,
    bias_coefficient: float = 1.0,
    pdl: bool = False,
    splits: int = 0,
) -> Tensor:
    """The coefficients of every tile column, as partial sums [S, C, block_m]: xA, 1 for a bias, zero where not active.

    S is ``splits``, or by default 1 (in x's dtype) where the tiles alone fill a GPU; else K is cut into S parts
    (float32), whose order of adding up is fixed, so that the same batch gives the same bits. x [T, K]; a pools [P, K],
    or ``None`` for slots with biases only. Raises ValueError for shapes that do not fit.
    """
    config = config or Config()
    check_matrix("x", x)
    check_dtypes(x=x, **{f"pool {i}": pool.a for i, pool in enumerate(pools)})
    if columns.block_m != config.block_m or columns.rows != x.shape[0] or columns.slices != len(pools):
        raise ValueError(
            f"got lists of {columns.slices} slices for T = {columns.rows} in tiles of {columns.block_m} rows, expected "
            f"{len(pools)} slices, T = {x.shape[0]}, tiles of {config.block_m}"
        )
    splits = splits or k_splits(columns.tiles * columns.slices, x.shape[1], config.block_k)
    kind = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, columns.capacity, config.block_m, dtype=kind, device=x.device)
    if not columns.count:
        return out
    shrink_kernel[(columns.tiles, columns.slices, splits)](
        x,
        out,
        *pool_arguments(x, pools)[:3],
        columns.starts,
        columns.pool_rows,
        columns.ranges,
        x.shape[0],
        x.shape[1],
        x.shape[1] // splits,
        columns.capacity,
        x.stride(0),
        x.shape[1],
        OVERFLOW=columns.widest > config.rank_tile,
        SLICES=columns.slices,
        BIAS=bias_coefficient,
        BM=config.block_m,
        BK=config.block_k,
        RT=config.rank_tile,
        EVEN_K=x.shape[1] % config.block_k == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PDL=pdl,
        enable_fp_fusion=True,
        num_warps=4,
        num_stages=config.stages,
    )
    return out


def k_splits(programs: int, k: int, block_k: int) -> int:
    """Into how many equal parts K is cut, so that a shrink of so many tiles fills a GPU: two steps a part at least."""
    steps = k // block_k if k % block_k == 0 else 1
    fits = [s for s in range(1, steps // 2 + 1) if steps % s == 0 and programs * s <= FILLED]
    return max(fits, default=1)


def linear_lora_epilogue(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pools: Sequence[Pools],
    columns: TileColumns,
    coefficients: Tensor,
    activation: str = "",
    config: Config | None = None,
    pdl: bool = False,
) -> Tensor:
    """y [T, N] = act(x Wᵀ + bias + coefficients B): the base linear, whose epilogue reads what a shrink wrote.

    x [T, K], w [N, K], bias [N], b pools [P, N of a slice], coefficients [S, C, block_m].
    """
    return launch_linear(x, w, bias, pools, columns, activation, config or Config(), coefficients, pdl=pdl)


def split_lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pools: Sequence[Pools],
    columns: TileColumns,
    activation: str = "",
    config: Config | None = None,
) -> Tensor:
    """``fused_lora_linear`` in two launches, overlapping where the GPU has programmatic dependent launch."""
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    coefficients = segmented_lora_shrink(x, pools, columns, config, pdl=pdl)
    return linear_lora_epilogue(x, w, bias, pools, columns, coefficients, activation, config, pdl)


def lora_expand(
    y: Tensor, coefficients: Tensor, pools: Sequence[Pools], columns: TileColumns, config: Config | None = None
) -> Tensor:
    """``y += coefficients B`` in place, y [T, N]: the second half of the unfused pair. Returns y."""
    config = config or Config()
    check_matrix("y", y)
    check_dtypes(y=y, **{f"pool {i}": pool.b for i, pool in enumerate(pools)})
    if not columns.count:
        return y
    width = y.shape[1] // columns.slices
    expand_kernel[(columns.tiles, cdiv(width, config.block_n), columns.slices)](
        y,
        coefficients,
        *pool_arguments(y, pools)[3:],
        columns.starts,
        columns.pool_rows,
        columns.ranges,
        y.shape[0],
        width,
        columns.capacity,
        y.stride(0),
        width,
        SPLITS=coefficients.shape[0],
        SLICES=columns.slices,
        BM=config.block_m,
        BN=config.block_n,
        RT=config.rank_tile,
        PRECISION="ieee" if y.dtype == torch.float32 else "tf32",
        enable_fp_fusion=True,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y
