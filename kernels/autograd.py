"""Gradients of the fused linear, so that training runs on the kernels that serve.

With s the coefficients and u = dy B their gradients, the gradient of x is ``dy W + u A``: the very same kernel with W
transposed, the pools exchanged and biases silent. ``dA = uᵀ x`` and ``dB = sᵀ dy`` (where a bias has s = 1, so that its
row of dB is the sum of dy) are one more kernel, which adds up a pool row's batch rows in a fixed order: no atomics, the
same bits every time. W and b are frozen, as everywhere here; where they do ask for gradients torch computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.blocks import Int, Ptr, jit_any_rows
from bertology_serve.kernels.columns import Pools, TileColumns, laid_out
from bertology_serve.kernels.fused_lora_linear import launch_linear
from bertology_serve.kernels.shrink_expand import segmented_lora_shrink
from bertology_serve.kernels.tuning import Config, cdiv


@jit_any_rows
def pool_gradient_kernel(
    z: Ptr,  # [T, W]
    coefficients: Ptr,  # [C, BM]
    order: Ptr,  # int32 [C]: columns sorted by pool row
    tiles: Ptr,  # int32 [C]: the tile of each sorted column
    begins: Ptr,  # int32 [P + 1]: the sorted columns of a pool row
    out: Ptr,  # fp32 [P, W], written in full
    T: Int, W: Int, stride_z: Int,
    BM: tl.constexpr, BW: tl.constexpr,
) -> None:  # fmt: skip
    """``out[p] = Σ over p's columns of coefficientsᵀ z``, one pool row and BW columns of z per program."""
    row = tl.program_id(0)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    m = tl.arange(0, BM)
    acc = tl.zeros([BW], tl.float32)
    for i in range(tl.load(begins + row), tl.load(begins + row + 1)):
        column = tl.load(order + i).to(tl.int64)
        m0 = tl.load(tiles + i).to(tl.int64) * BM
        s = tl.load(coefficients + column * BM + m).to(tl.float32)
        inside = (m < T - m0)[:, None] & (w < W)[None, :]
        block = tl.load(z + (m0 + m)[:, None] * stride_z + w[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(s[:, None] * block, 0)
    tl.store(out + row.to(tl.int64) * W + w, acc, mask=w < W)


def pool_gradient(z: Tensor, coefficients: Tensor, columns: TileColumns, part: int, height: int) -> Tensor:
    """fp32 [height, W]: for every pool row of a slice, the sum over the batch of its coefficient times z's row.

    z [T, W], coefficients [S, C, block_m] as the shrink writes them, ``height`` P of the slice's pool.
    """
    coefficients = coefficients[0] if len(coefficients) == 1 else coefficients.sum(0)
    starts = columns.starts[part * columns.tiles : (part + 1) * columns.tiles + 1].long()
    first, last = columns.bounds[part : part + 2]
    rows = columns.pool_rows[first:last]
    tile = torch.repeat_interleave(starts.diff(), output_size=last - first)
    rows, order = torch.sort(rows, stable=True)
    begins = torch.searchsorted(rows.long(), torch.arange(height + 1, device=z.device))
    out = torch.empty(height, z.shape[1], dtype=torch.float32, device=z.device)
    block_w = 64
    pool_gradient_kernel[(height, cdiv(z.shape[1], block_w))](
        z,
        coefficients,
        (order + first).int(),
        tile[order].int(),
        begins.int(),
        out,
        z.shape[0],
        z.shape[1],
        z.stride(0),
        BM=columns.block_m,
        BW=block_w,
        enable_fp_fusion=True,
        num_warps=4,
    )
    return out


class FusedLoraLinear(torch.autograd.Function):
    """``fused_lora_linear`` without activation, as a function of x, w, bias and the pools."""

    @staticmethod
    def forward(
        ctx: Any, columns: TileColumns, config: Config, x: Tensor, w: Tensor, bias: Tensor | None, *flat: Tensor | None
    ) -> Tensor:
        """``flat``: a and b of every slice in turn."""
        pools = _paired(flat)
        ctx.columns, ctx.config, ctx.has_bias = columns, config, bias is not None
        ctx.save_for_backward(x, w, *flat)
        return launch_linear(x, w, bias, pools, columns, "", config)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w, bias and the pools, each only where it is asked for."""
        x, w, *flat = ctx.saved_tensors
        dy = gradients[0].contiguous()
        _, _, wants_x, wants_w, wants_bias, *wants = ctx.needs_input_grad
        pools = _paired(flat)
        dx = _input_gradient(dy, w, pools, ctx.columns, ctx.config) if wants_x else None
        dw = (dy.T @ x).to(w.dtype) if wants_w else None
        db = dy.sum(0) if wants_bias else None
        return None, None, dx, dw, db, *_pool_gradients(x, dy, pools, ctx.columns, ctx.config, wants)


def differentiable_lora_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, pools: Sequence[Pools], columns: TileColumns, config: Config
) -> Tensor:
    """``fused_lora_linear`` of a recorded graph: y [T, N] with gradients to x, w, bias and the pools."""
    flat = [tensor for pool in pools for tensor in pool]
    y: Tensor = FusedLoraLinear.apply(columns, config, x, w, bias, *flat)  # type: ignore[no-untyped-call]
    return y


def _paired(flat: Sequence[Tensor | None]) -> list[Pools]:
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [Pools(a, b) for a, b in pairs if b is not None]


def _input_gradient(dy: Tensor, w: Tensor, pools: Sequence[Pools], columns: TileColumns, config: Config) -> Tensor:
    """dx [T, K] = dy W + Σ (dy B) A. Slices share their x, so each adds its part: one launch for each slice.

    A slice with biases only has no A: nothing but dy W reaches x through it.
    """
    width = w.shape[0] // max(1, len(pools))
    config = replace(config, tma=False)
    total: Tensor | None = None
    for part, pool in enumerate(pools):
        mine = slice(part * width, (part + 1) * width)
        lists, turned = (None, []) if pool.a is None else (_one_slice(columns, part), [Pools(pool.b, pool.a)])
        dx = launch_linear(dy[:, mine], w[mine].T, None, turned, lists, "", config, bias_coefficient=0.0)
        total = dx if total is None else total + dx
    assert total is not None
    return total


def _one_slice(columns: TileColumns, part: int) -> TileColumns:
    """The lists of one slice alone; column numbers stay those of the whole."""
    if columns.slices == 1:
        return columns
    starts = columns.starts[part * columns.tiles : (part + 1) * columns.tiles + 1]
    return replace(
        columns,
        packed=laid_out(starts, columns.pool_rows, columns.ranges),
        slices=1,
        bounds=columns.bounds[part : part + 2],
    )


def _pool_gradients(
    x: Tensor, dy: Tensor, pools: Sequence[Pools], columns: TileColumns, config: Config, wants: Sequence[bool]
) -> list[Tensor | None]:
    """dA and dB of every slice, ``None`` where not asked for."""
    found: list[Tensor | None] = []
    width = dy.shape[1] // max(1, len(pools))
    if any(wants[1::2]):
        s = segmented_lora_shrink(x, pools, columns, config)
    for part, (a, b) in enumerate(pools):
        mine, lists = dy[:, part * width : (part + 1) * width], _one_slice(columns, part)
        if wants[2 * part] and a is not None:
            u = segmented_lora_shrink(mine, [Pools(b, a)], lists, config, bias_coefficient=0.0)
            found.append(pool_gradient(x, u, columns, part, a.shape[0]).to(a.dtype))
        else:
            found.append(None)
        found.append(pool_gradient(mine, s, columns, part, b.shape[0]).to(b.dtype) if wants[2 * part + 1] else None)
    return found
