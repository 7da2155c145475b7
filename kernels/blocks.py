"""What the Triton kernels share: the typed decorator, shape checks, and device code of the matrix kernels.

The code is activations, tile loads, the K loops, the rank columns of a tile. Shapes are BM rows, BN output columns,
BK of the K loop, RT rank columns. Row indices are clamped rather than masked: rows beyond T or N repeat the last
one, and only stores are masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

Decorator: TypeAlias = Callable[[Callable[..., Any]], Any]
jit: Decorator = triton.jit
jit_any_rows: Decorator = triton.jit(do_not_specialize=["T"])
"""For kernels over a batch of T rows: one compilation for every T, whether 16 divides it or not."""
Ptr: TypeAlias = tl.tensor
Int: TypeAlias = tl.tensor
Block: TypeAlias = tl.tensor
"""What a kernel's arguments are: a pointer (or a tensor descriptor), a number, a block of numbers."""

TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def check_matrix(name: str, tensor: Tensor, columns: int | None = None) -> None:
    """Raises ValueError where a tensor is no matrix with contiguous rows (of ``columns`` elements)."""
    if tensor.ndim != 2 or tensor.stride(1) != 1 or (columns is not None and tensor.shape[1] != columns):
        width = "any" if columns is None else columns
        raise ValueError(
            f"got {name} of shape {tuple(tensor.shape)} and strides {tensor.stride()}, "
            f"expected rows of {width} contiguous elements"
        )


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raises ValueError where tensors differ in dtype, or have one that no kernel is written for."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor is not None}
    if len(kinds) != 1 or not kinds <= TRITON_NAMES.keys():
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor is not None)
        raise ValueError(f"got {got}; expected all of one dtype among {', '.join(map(str, TRITON_NAMES))}")


@jit
def grouped_order(program: Int, tiles_m: Int, tiles_n: Int, GROUP: tl.constexpr) -> tuple[Int, Int]:
    """(m, n) of a program, so that GROUP tiles of M share the tiles of W that they read, in L2."""
    width = GROUP * tiles_n
    first = (program // width) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (program % width) % height, (program % width) // height


@jit
def x_tile(
    x: Ptr, m0: Int, k0: Int, T: Int, K: Int, stride: Int,
    BM: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
) -> Block:  # fmt: skip
    """x[m0 : m0 + BM, k0 : k0 + BK] of x [T, K]; zeros beyond K."""
    if TMA:
        tile = x.load([m0, k0])
    else:
        ks = tl.arange(0, BK)
        ms = tl.minimum(tl.arange(0, BM), T - 1 - m0)
        at = x + m0.to(tl.int64) * stride + k0 + (ms[:, None] * stride + ks[None, :])
        tile = tl.load(at) if EVEN_K else tl.load(at, mask=(ks < K - k0)[None, :], other=0.0)
    return tile


@jit
def w_tile(
    w: Ptr, n0: Int, k0: Int, N: Int, K: Int, stride_n: Int, stride_k: Int,
    BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
) -> Block:  # fmt: skip
    """W[n0 : n0 + BN, k0 : k0 + BK] of W [N, K], of any strides; zeros beyond K."""
    if TMA:
        tile = w.load([n0, k0])
    else:
        ks = tl.arange(0, BK)
        ns = tl.minimum(tl.arange(0, BN), N - 1 - n0)
        at = w + n0.to(tl.int64) * stride_n + k0 * stride_k + (ns[:, None] * stride_n + ks[None, :] * stride_k)
        tile = tl.load(at) if EVEN_K else tl.load(at, mask=(ks < K - k0)[None, :], other=0.0)
    return tile


@jit
def base_product(
    x: Ptr, w: Ptr, m0: Int, n0: Int, T: Int, N: Int, K: Int, stride_x: Int, stride_n: Int, stride_k: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
) -> Block:  # fmt: skip
    """x Wᵀ of one tile, fp32 [BM, BN]."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        xs = x_tile(x, m0, k0, T, K, stride_x, BM, BK, EVEN_K, TMA)
        ws = w_tile(w, n0, k0, N, K, stride_n, stride_k, BN, BK, EVEN_K, TMA)
        acc = tl.dot(xs, ws.T, acc, input_precision=PRECISION)
    return acc


@jit
def column_rows(rows: Ptr, ranges: Ptr, first: Int, last: Int, RT: tl.constexpr) -> tuple[Block, Block]:
    """Pool rows int64 and ranges int32 [RT] of the columns from ``first``; beyond ``last``: row 0, never active."""
    at = first + tl.arange(0, RT)
    row = tl.load(rows + at, mask=at < last, other=0).to(tl.int64)
    return row, tl.load(ranges + at, mask=at < last, other=0)


@jit
def a_tile(
    a: Ptr, row: Block, ranges: Block, k0: Int, K: Int, stride: Int, BK: tl.constexpr, EVEN_K: tl.constexpr,
) -> Block:  # fmt: skip
    """A_pool[row, k0 : k0 + BK], [RT, BK]; bias columns read row 0, since a pool of biases may have no A."""
    ks = tl.arange(0, BK)
    mine = tl.where(ranges >> 24 > 0, 0, row)
    at = a + mine[:, None] * stride + (k0 + ks)[None, :]
    return tl.load(at) if EVEN_K else tl.load(at, mask=(ks < K - k0)[None, :], other=0.0)


@jit
def b_tile(b: Ptr, row: Block, n: Block, n_end: Int, stride: Int) -> Block:
    """B_pool[row, n], [RT, BN]; zeros beyond ``n_end``."""
    return tl.load(b + row[:, None] * stride + n[None, :], mask=(n < n_end)[None, :], other=0.0)


@jit
def masked(s: Block, ranges: Block, BM: tl.constexpr, bias: float) -> Block:
    """Coefficients fp32 [BM, RT]: ``bias`` in bias columns, xA in the others, zero where a column is not active."""
    m = tl.arange(0, BM)[:, None]
    lo, hi, kind = ranges & 4095, (ranges >> 12) & 4095, ranges >> 24
    s = tl.where(kind[None, :] > 0, bias, s)
    return tl.where((m >= lo[None, :]) & (m < hi[None, :]), s, 0.0)


@jit
def shrunk(
    x: Ptr, a: Ptr, row: Block, ranges: Block, m0: Int, k_first: Int, T: Int, K: Int,
    stride_x: Int, stride_a: Int, span: Int,
    BM: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
) -> Block:  # fmt: skip
    """Coefficients fp32 [BM, RT] of one tile's columns, summed over k_first to k_first + span; biases count from 0."""
    s = tl.zeros([BM, RT], tl.float32)
    for k0 in range(0, span, BK):
        xs = x_tile(x, m0, k_first + k0, T, K, stride_x, BM, BK, EVEN_K, TMA)
        rows = a_tile(a, row, ranges, k_first + k0, K, stride_a, BK, EVEN_K)
        s = tl.dot(xs, rows.T, s, input_precision=PRECISION)
    return masked(s, ranges, BM, tl.where(k_first == 0, BIAS, 0.0))


@jit
def fused_product(
    x: Ptr, w: Ptr, a: Ptr, row: Block, ranges: Block, m0: Int, n0: Int, T: Int, N: Int, K: Int,
    stride_x: Int, stride_n: Int, stride_k: Int, stride_a: Int,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[Block, Block]:  # fmt: skip
    """x Wᵀ fp32 [BM, BN], term by term as ``base_product``, and the coefficients [BM, RT], from one pass over x."""
    acc = tl.zeros([BM, BN], tl.float32)
    s = tl.zeros([BM, RT], tl.float32)
    for k0 in range(0, K, BK):
        xs = x_tile(x, m0, k0, T, K, stride_x, BM, BK, EVEN_K, TMA)
        ws = w_tile(w, n0, k0, N, K, stride_n, stride_k, BN, BK, EVEN_K, TMA)
        acc = tl.dot(xs, ws.T, acc, input_precision=PRECISION)
        rows = a_tile(a, row, ranges, k0, K, stride_a, BK, EVEN_K)
        s = tl.dot(xs, rows.T, s, input_precision=PRECISION)
    return acc, masked(s, ranges, BM, BIAS)


@jit
def activate(v: Block, ACTIVATION: tl.constexpr) -> Block:
    """act(v) for fp32 v of any shape; "" is the identity, "gelu" the exact one (Hendrycks & Gimpel, 2016)."""
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    elif ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "tanh":
        v = 2.0 * tl.sigmoid(2.0 * v) - 1.0
    else:
        tl.static_assert(ACTIVATION == "", "an activation that kernels do not have")
    return v
