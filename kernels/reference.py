"""Torch references of the kernels, with the kernels' signatures: what they are compared with.

They work in any dtype (float64 in the tests) and on any device, tile by tile, and are written to be read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from bertology_serve.kernels.columns import Pools, TileColumns, active
from bertology_serve.kernels.segments import ACTIVATIONS


def fused_lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    pools: Sequence[Pools] = (),
    columns: TileColumns | None = None,
    activation: str = "",
) -> Tensor:
    """y [T, N] = act(x Wᵀ + bias + the active rank columns); see the kernel of that name."""
    y = F.linear(x, w, bias)
    if columns is not None:
        width = w.shape[0] // columns.slices
        for part, (a, b) in enumerate(pools):
            mine = y[:, part * width : (part + 1) * width]
            for tile in range(columns.tiles):
                for row, lo, hi, is_bias in active(columns, part, tile):
                    s = x.new_ones(hi - lo, 1) if is_bias or a is None else x[lo:hi] @ a[row].unsqueeze(1)
                    mine[lo:hi] += s * b[row]
    return ACTIVATIONS[activation](y) if activation else y


def segmented_lora_shrink(x: Tensor, pools: Sequence[Pools], columns: TileColumns) -> Tensor:
    """Coefficients [C, block_m] of every tile column; see the kernel of that name."""
    out = x.new_zeros(columns.capacity, columns.block_m)
    number = 0
    for part, (a, _) in enumerate(pools):
        for tile in range(columns.tiles):
            at = tile * columns.block_m
            for row, lo, hi, is_bias in active(columns, part, tile):
                out[number, lo - at : hi - at] = 1.0 if is_bias or a is None else x[lo:hi] @ a[row]
                number += 1
    return out


def grouped_bottleneck_adapter(
    residual: Tensor,
    source: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    columns: TileColumns,
    activation: str,
) -> Tensor:
    """y [T, H] = residual + act(source Dᵀ + b_d) U + b_u on the active rows; see the kernel of that name."""
    y = residual.clone()
    for tile in range(columns.tiles):
        for row, lo, hi, is_bias in active(columns, 0, tile):
            unit = source.new_ones(hi - lo)
            if not is_bias:
                unit = ACTIVATIONS[activation](source[lo:hi] @ down[row] + down_bias[row, 0])
            y[lo:hi] += unit[:, None] * up[row]
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    residual: Tensor | None = None,
    pool: Tensor | None = None,
    columns: TileColumns | None = None,
) -> Tensor:
    """y [T, H] = LayerNorm(x + residual) with each delta's bias on its rows; see the kernel of that name."""
    y = F.layer_norm(x if residual is None else x + residual, x.shape[1:], weight, bias, eps)
    for tile in range(columns.tiles if columns is not None and pool is not None else 0):
        assert columns is not None
        assert pool is not None
        for row, lo, hi, _ in active(columns, 0, tile):
            y[lo:hi] += pool[row]
    return y
