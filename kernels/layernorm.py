"""``y = LayerNorm(x + residual) γ + β + Δβ``, one pass over whole rows, with each delta's own bias on its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.blocks import Int, Ptr, check_dtypes, check_matrix, jit
from bertology_serve.kernels.columns import TileColumns
from bertology_serve.kernels.tuning import cdiv

BLOCK_ROWS = 4


@jit
def layer_norm_kernel(
    x: Ptr, residual: Ptr, y: Ptr,  # [T, H]
    weight: Ptr, bias: Ptr,  # [H]
    pool: Ptr,  # [P, H]
    starts: Ptr,  # int32 [tiles + 1]
    rows: Ptr, ranges: Ptr,  # int32 [C]
    T: Int, H: Int, stride_x: Int, stride_r: Int, eps: Int,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, DELTAS: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
) -> None:  # fmt: skip
    """BM whole rows; sums in fp32."""
    tile = tl.program_id(0)
    m0 = (tile * BM).to(tl.int64)
    m = tl.arange(0, BM)
    h = tl.arange(0, BH)
    inside = h < H
    mask = (m < T - m0)[:, None] & inside[None, :]
    v = tl.load(x + (m0 + m)[:, None] * stride_x + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual + (m0 + m)[:, None] * stride_r + h[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, 1) / H
    centred = tl.where(inside[None, :], v - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / H + eps)
    out = centred * scale[:, None] * tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + h, mask=inside, other=0.0).to(tl.float32)[None, :]
    if DELTAS:
        for c in range(tl.load(starts + tile), tl.load(starts + tile + 1)):
            own = tl.load(ranges + c)
            shift = tl.load(pool + tl.load(rows + c).to(tl.int64) * H + h, mask=inside, other=0.0).to(tl.float32)
            active = (m >= (own & 4095)) & (m < ((own >> 12) & 4095))
            out += tl.where(active[:, None], shift[None, :], 0.0)
    tl.store(y + (m0 + m)[:, None] * H + h[None, :], out.to(y.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    residual: Tensor | None = None,
    pool: Tensor | None = None,
    columns: TileColumns | None = None,
) -> Tensor:
    """y [T, H]: x and residual [T, H], weight and bias [H], pool [P, H] of the deltas' biases.

    ``columns`` are lists over tiles of ``BLOCK_ROWS`` rows. Raises ValueError for shapes that do not fit.
    """
    tokens, hidden = x.shape
    check_matrix("x", x)
    check_dtypes(x=x, weight=weight, bias=bias, residual=residual, pool=pool)
    if residual is not None:
        check_matrix("residual", residual, hidden)
    columns = columns if columns is not None and pool is not None and columns.count else None
    if columns is not None and (columns.block_m != BLOCK_ROWS or columns.rows != tokens):
        raise ValueError(f"got lists for T = {columns.rows}, tiles of {columns.block_m}; need {tokens}, {BLOCK_ROWS}")
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    layer_norm_kernel[(cdiv(tokens, BLOCK_ROWS),)](
        x,
        residual if residual is not None else x,
        y,
        weight,
        bias if bias is not None else x,
        pool if pool is not None else x,
        *((columns.starts, columns.pool_rows, columns.ranges) if columns is not None else (x, x, x)),
        tokens,
        hidden,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        eps,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        DELTAS=columns is not None,
        BM=BLOCK_ROWS,
        BH=triton.next_power_of_2(hidden),
        enable_fp_fusion=True,
        num_warps=4,
    )
    return y
