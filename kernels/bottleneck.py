"""``y = residual + act(source Dᵀ + b_d) U + b_u`` of many bottleneck adapters in one kernel (Houlsby et al., 2019).

The same tiles and column lists as the linears': a column is one bottleneck unit of one adapter, and its bias column is
b_u. A program owns BM rows, computes their units once and then walks over the output; units beyond RT take another
round, which adds to what the round before has written. Rows without an adapter are copies of the residual.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.blocks import (
    Int,
    Ptr,
    a_tile,
    activate,
    b_tile,
    check_dtypes,
    check_matrix,
    column_rows,
    jit_any_rows,
    masked,
    x_tile,
)
from bertology_serve.kernels.columns import TileColumns
from bertology_serve.kernels.tuning import FILLED, Config, adapter_config, cdiv


@jit_any_rows
def bottleneck_kernel(
    residual: Ptr, source: Ptr, y: Ptr,  # [T, H]
    down: Ptr,  # [P, H]
    down_bias: Ptr,  # [P]
    up: Ptr,  # [P, H]
    starts: Ptr,  # int32 [tiles + 1]
    rows: Ptr, ranges: Ptr,  # int32 [C]
    T: Int, H: Int, stride_r: Int, stride_s: Int, width: Int,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """BM rows of ``width`` output columns, units in rounds of RT."""
    tile = tl.program_id(0)
    m0 = tile * BM
    n_first = tl.program_id(1) * width
    n_end = tl.minimum(n_first + width, H)
    m = tl.arange(0, BM)
    first = tl.load(starts + tile)
    last = tl.load(starts + tile + 1)
    to = y + m0.to(tl.int64) * H
    came = residual + m0.to(tl.int64) * stride_r
    if first == last:
        for n0 in range(n_first, n_end, BN):
            n = n0 + tl.arange(0, BN)
            mask = (m < T - m0)[:, None] & (n < n_end)[None, :]
            kept = tl.load(came + (m[:, None] * stride_r + n[None, :]), mask=mask, other=0.0)
            tl.store(to + (m[:, None] * H + n[None, :]), kept, mask=mask)
    for c in range(first, last, RT):
        row, own = column_rows(rows, ranges, c, last, RT)
        s = tl.zeros([BM, RT], tl.float32)
        for k0 in range(0, H, BK):
            xs = x_tile(source, m0, k0, T, H, stride_s, BM, BK, EVEN_K, False)
            s = tl.dot(xs, a_tile(down, row, own, k0, H, H, BK, EVEN_K).T, s, input_precision=PRECISION)
        s = activate(s + tl.load(down_bias + row).to(tl.float32)[None, :], ACTIVATION)
        s = masked(s, own, BM, 1.0).to(y.dtype.element_ty)
        for n0 in range(n_first, n_end, BN):
            n = n0 + tl.arange(0, BN)
            mask = (m < T - m0)[:, None] & (n < n_end)[None, :]
            if c == first:
                acc = tl.load(came + (m[:, None] * stride_r + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            else:
                acc = tl.load(to + (m[:, None] * H + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            acc = tl.dot(s, b_tile(up, row, n, n_end, H), acc, input_precision=PRECISION)
            tl.store(to + (m[:, None] * H + n[None, :]), acc.to(y.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next round reads what this one wrote


def grouped_bottleneck_adapter(
    residual: Tensor,
    source: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    columns: TileColumns,
    activation: str,
    config: Config | None = None,
) -> Tensor:
    """y [T, H] = residual + every active adapter of ``source``, one activation for the launch.

    residual and source [T, H] (often the same); pools down [P, H], down_bias [P, 1], up [P, H]; a segment's bias row of
    ``up`` is its b_u. Raises ValueError for shapes that do not fit.
    """
    config = config or adapter_config(residual.dtype != torch.float32)
    check_matrix("source", source, residual.shape[1])
    check_matrix("residual", residual)
    check_dtypes(residual=residual, source=source, down=down, down_bias=down_bias, up=up)
    (tokens, hidden), shape = residual.shape, (down.shape[0], residual.shape[1])
    pools_fit = down.shape == up.shape == shape and down.is_contiguous() and up.is_contiguous()
    if not pools_fit or down_bias.shape[0] != shape[0] or columns.slices != 1:
        raise ValueError(
            f"got pools {tuple(down.shape)}, {tuple(down_bias.shape)}, {tuple(up.shape)}, expected {shape}"
        )
    if columns.block_m != config.block_m or columns.rows != tokens:
        raise ValueError(
            f"got lists for T = {columns.rows} in tiles of {columns.block_m} rows, expected T = {tokens} in tiles of "
            f"{config.block_m}"
        )
    y = torch.empty(tokens, hidden, dtype=residual.dtype, device=residual.device)
    if tokens == 0:
        return y
    parts = min(cdiv(FILLED, columns.tiles), cdiv(hidden, config.block_n))  # few rows: split the output
    width = cdiv(cdiv(hidden, parts), config.block_n) * config.block_n
    bottleneck_kernel[(columns.tiles, cdiv(hidden, width))](
        residual,
        source,
        y,
        down,
        down_bias.contiguous(),
        up,
        columns.starts,
        columns.pool_rows,
        columns.ranges,
        tokens,
        hidden,
        residual.stride(0),
        source.stride(0),
        width,
        ACTIVATION=activation,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        RT=config.rank_tile,
        EVEN_K=hidden % config.block_k == 0,
        PRECISION="ieee" if residual.dtype == torch.float32 else "tf32",
        enable_fp_fusion=True,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y
