"""``y = act(x Wᵀ + b + Σ active rank columns)`` in one kernel: base product, shrink and expand.

Every program owns one M tile and ``sweep`` N tiles. While it computes the first x Wᵀ it also multiplies the very same x
tiles with the A rows of the tile's columns; the coefficients s stay in registers, and s B is one more matrix product
into the accumulator before the only store. With sweep 1 every N tile recomputes s (small batches, more programs); with
more it is kept. Columns beyond the first RT cost a K loop of their own: right, but slower (see ``shrink_expand``).
The kernel also runs with s read from memory (``linear_lora_epilogue``) and without columns (plain linear).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.blocks import (
    Block,
    Int,
    Ptr,
    activate,
    b_tile,
    base_product,
    check_dtypes,
    check_matrix,
    column_rows,
    fused_product,
    grouped_order,
    jit,
    jit_any_rows,
    shrunk,
)
from bertology_serve.kernels.columns import Pools, TileColumns
from bertology_serve.kernels.tuning import FILLED, Config, cdiv

GROUP = 8
NONE, COMPUTE, READ = 0, 1, 2
MAX_SLICES = 3


@jit
def read_coefficients(
    coefficients: Ptr, first: Int, last: Int, capacity: Int,
    BM: tl.constexpr, RT: tl.constexpr, SPLITS: tl.constexpr, kind: tl.constexpr,
) -> Block:  # fmt: skip
    """s [BM, RT] of one tile from ``first``: the partial sums of [SPLITS, C, BM], added in their order."""
    at = (first + tl.arange(0, RT)).to(tl.int64)
    read = coefficients + at[None, :] * BM + tl.arange(0, BM)[:, None]
    s = tl.load(read, mask=(at < last)[None, :], other=0.0)
    for part in tl.static_range(1, SPLITS):
        s += tl.load(read + capacity.to(tl.int64) * BM * part, mask=(at < last)[None, :], other=0.0)
    return s.to(kind)


@jit
def one_program(
    program: Int,
    x: Ptr,
    w: Ptr,
    bias: Ptr,
    y: Ptr,
    a0: Ptr, a1: Ptr, a2: Ptr,
    b0: Ptr, b1: Ptr, b2: Ptr,
    starts: Ptr,
    rows: Ptr, ranges: Ptr,
    coefficients: Ptr,
    T: Int, width: Int, K: Int, capacity: Int,
    stride_x: Int, stride_wn: Int, stride_wk: Int, stride_y: Int, stride_a: Int, stride_b: Int,
    LORA: tl.constexpr,
    OVERFLOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr, SWEEP: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """One M tile times SWEEP N tiles of one slice; see the module's text."""
    tiles = tl.cdiv(T, BM)
    N = width * SLICES
    groups = tl.cdiv(width, BN * SWEEP)
    tile, group = grouped_order(program, tiles, groups * SLICES, GROUP)
    part = group // groups
    m0 = tile * BM
    n_end = (part + 1) * width
    n_first = part * width + (group % groups) * (BN * SWEEP)
    a = a0
    b = b0
    if SLICES > 1:
        if part == 1:
            a = a1
            b = b1
        if part == 2:
            a = a2
            b = b2
    if LORA > 0:
        first = tl.load(starts + part * tiles + tile)
        last = tl.load(starts + part * tiles + tile + 1)
        row, own = column_rows(rows, ranges, first, last, RT)
    for j in tl.static_range(SWEEP):
        n0 = n_first + j * BN
        n = n0 + tl.arange(0, BN)
        if LORA > 0:  # what the epilogue needs is asked for before the K loop, which hides the wait
            up = b_tile(b, row, n - part * width, width, stride_b)
        if HAS_BIAS:
            shift = tl.load(bias + n, mask=n < n_end, other=0.0).to(tl.float32)
        if LORA == 1 and j == 0:
            if first < last:
                acc, raw = fused_product(
                    x, w, a, row, own, m0, n0, T, N, K, stride_x, stride_wn, stride_wk, stride_a,
                    BM, BN, BK, RT, BIAS, EVEN_K, TMA, PRECISION,
                )  # fmt: skip
                s = raw.to(y.dtype.element_ty)
            else:
                acc = base_product(
                    x, w, m0, n0, T, N, K, stride_x, stride_wn, stride_wk, BM, BN, BK, EVEN_K, TMA, PRECISION
                )
                s = tl.zeros([BM, RT], y.dtype.element_ty)
        else:
            acc = base_product(
                x, w, m0, n0, T, N, K, stride_x, stride_wn, stride_wk, BM, BN, BK, EVEN_K, TMA, PRECISION
            )
        if LORA == 2 and j == 0:
            if PDL:
                tl.extra.cuda.gdc_wait()  # the shrink ran beside the K loop above
            s = read_coefficients(coefficients, first, last, capacity, BM, RT, SPLITS, y.dtype.element_ty)
        if LORA > 0:  # noqa: SIM102
            if first < last:
                acc = tl.dot(s, up, acc, input_precision=PRECISION)
        if OVERFLOW:  # a constant: this loop keeps ptxas from overlapping any matrix instruction of the kernel
            for c in range(first + RT, last, RT):
                more, its = column_rows(rows, ranges, c, last, RT)
                if LORA == 1:
                    raw = shrunk(x, a, more, its, m0, 0, T, K, stride_x, stride_a, K,
                                 BM, BK, RT, BIAS, EVEN_K, TMA, PRECISION)  # fmt: skip
                    extra = raw.to(y.dtype.element_ty)
                else:
                    extra = read_coefficients(coefficients, c, last, capacity, BM, RT, SPLITS, y.dtype.element_ty)
                acc = tl.dot(extra, b_tile(b, more, n - part * width, width, stride_b), acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += shift[None, :]
        m = tl.arange(0, BM)
        out = y + m0.to(tl.int64) * stride_y + (m[:, None] * stride_y + n[None, :])
        tl.store(out, activate(acc, ACTIVATION).to(y.dtype.element_ty),
                 mask=(m < T - m0)[:, None] & (n < n_end)[None, :])  # fmt: skip


@jit_any_rows
def fused_lora_linear_kernel(
    x: Ptr,  # [T, K], or its descriptor
    w: Ptr,  # [N, K], or its descriptor
    bias: Ptr,  # [N]
    y: Ptr,  # [T, N]
    a0: Ptr, a1: Ptr, a2: Ptr,  # [P, K] of each slice
    b0: Ptr, b1: Ptr, b2: Ptr,  # [P, width]
    starts: Ptr,  # int32 [SLICES * tiles + 1]
    rows: Ptr, ranges: Ptr,  # int32 [C]
    coefficients: Ptr,  # [SPLITS, C, BM], read where LORA == 2
    T: Int, width: Int, K: Int, capacity: Int,  # N = SLICES * width; an argument keeps its divisibility known
    stride_x: Int, stride_wn: Int, stride_wk: Int, stride_y: Int, stride_a: Int, stride_b: Int,
    LORA: tl.constexpr,  # 0: no columns; 1: coefficients are computed; 2: they are read
    OVERFLOW: tl.constexpr,  # whether a tile may have more than RT columns
    SPLITS: tl.constexpr,
    PERSISTENT: tl.constexpr,  # whether each program does several in turn, so that few are started
    SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RT: tl.constexpr, SWEEP: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """All of y: see ``one_program``."""
    if PERSISTENT:
        programs = tl.cdiv(T, BM) * SLICES * tl.cdiv(width, BN * SWEEP)
        for program in range(tl.program_id(0), programs, tl.num_programs(0)):
            one_program(
                program,
                x, w, bias, y, a0, a1, a2, b0, b1, b2, starts, rows, ranges, coefficients, T, width, K,
                capacity, stride_x, stride_wn, stride_wk, stride_y, stride_a, stride_b, LORA, OVERFLOW,
                SPLITS, SLICES, HAS_BIAS, ACTIVATION, BIAS, BM, BN, BK, RT, SWEEP, EVEN_K, TMA, PRECISION,
                PDL, GROUP,
            )  # fmt: skip
    else:
        one_program(
            tl.program_id(0),
            x, w, bias, y, a0, a1, a2, b0, b1, b2, starts, rows, ranges, coefficients, T, width, K,
            capacity, stride_x, stride_wn, stride_wk, stride_y, stride_a, stride_b, LORA, OVERFLOW,
            SPLITS, SLICES, HAS_BIAS, ACTIVATION, BIAS, BM, BN, BK, RT, SWEEP, EVEN_K, TMA,
            PRECISION, PDL, GROUP,
        )  # fmt: skip


def fused_lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    pools: Sequence[Pools] = (),
    columns: TileColumns | None = None,
    activation: str = "",
    config: Config | None = None,
) -> Tensor:
    """y [T, N] = act(x Wᵀ + bias + the active rank columns).

    x [T, K]; w [N, K] of any strides; bias [N]; ``pools`` one per slice of N (three for a packed QKV projection), all
    of one dtype (fp32, fp16, bf16; sums are fp32); ``columns`` with one list per slice, or ``None`` for the plain
    linear, whose rows are bit-identical to those that no column touches. Raises ValueError for shapes that do not fit.
    """
    return launch_linear(x, w, bias, pools, columns, activation, config or Config())


def launch_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pools: Sequence[Pools],
    columns: TileColumns | None,
    activation: str,
    config: Config,
    coefficients: Tensor | None = None,
    bias_coefficient: float = 1.0,
    pdl: bool = False,
) -> Tensor:
    """The launch behind ``fused_lora_linear``, ``linear_lora_epilogue`` and the gradient of x."""
    _check(x, w, bias, pools, columns, config)
    (tokens, k), n = x.shape, w.shape[0]
    y = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    columns = columns if columns is not None and columns.count else None
    slices = len(pools) if columns is not None else 1
    tma = config.tma and _describable(x) and _describable(w)
    programs = cdiv(tokens, config.block_m) * slices * cdiv(n // slices, config.block_n * config.sweep)
    programs = min(programs, FILLED) if config.persistent else programs
    extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    fused_lora_linear_kernel[(programs,)](
        _described(x, config.block_m, config.block_k) if tma else x,
        _described(w, config.block_n, config.block_k) if tma else w,
        bias if bias is not None else x,
        y,
        *pool_arguments(x, pools if columns is not None else ()),
        *((columns.starts, columns.pool_rows, columns.ranges) if columns is not None else (x, x, x)),
        coefficients if coefficients is not None else x,
        tokens,
        n // slices,
        k,
        columns.capacity if columns is not None else 0,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        y.stride(0),
        k,
        n // slices,
        LORA=NONE if columns is None else READ if coefficients is not None else COMPUTE,
        OVERFLOW=columns is not None and columns.widest > config.rank_tile,
        SPLITS=coefficients.shape[0] if coefficients is not None else 1,
        PERSISTENT=config.persistent,
        SLICES=slices,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        BIAS=bias_coefficient,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        RT=config.rank_tile,
        SWEEP=config.sweep,
        EVEN_K=k % config.block_k == 0,
        TMA=tma,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PDL=pdl,
        GROUP=GROUP,
        enable_fp_fusion=True,
        num_warps=config.warps,
        num_stages=config.stages,
        **extra,
    )
    return y


def _check(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pools: Sequence[Pools],
    columns: TileColumns | None,
    config: Config,
) -> None:
    check_matrix("x", x)
    if w.ndim != 2 or w.shape[1] != x.shape[1] or (bias is not None and bias.shape != w.shape[:1]):
        raise ValueError(f"got x {tuple(x.shape)} and w {tuple(w.shape)}, expected x [T, K], w [N, K] and bias [N]")
    check_dtypes(x=x, w=w, bias=bias, **{f"pool {i}": p.b for i, p in enumerate(pools)})
    if columns is None:
        return
    if len(pools) != columns.slices or not 1 <= len(pools) <= MAX_SLICES or w.shape[0] % len(pools):
        raise ValueError(
            f"got {len(pools)} pools for lists of {columns.slices} slices and N = {w.shape[0]}; expected as many pools "
            f"as slices, 1 to {MAX_SLICES}, dividing N"
        )
    if columns.block_m != config.block_m or columns.rows != x.shape[0]:
        raise ValueError(
            f"got column lists for T = {columns.rows} in tiles of {columns.block_m} rows, the launch has "
            f"T = {x.shape[0]} in tiles of {config.block_m}"
        )
    for i, pool in enumerate(pools):
        check_matrix(f"b of pool {i}", pool.b, w.shape[0] // len(pools))
        if pool.a is not None:
            check_matrix(f"a of pool {i}", pool.a, x.shape[1])
        if not all(t.is_contiguous() for t in pool if t is not None):
            raise ValueError(f"got pool {i} with gaps between its rows; expected contiguous [P, K] and [P, N]")


def pool_arguments(x: Tensor, pools: Sequence[Pools]) -> list[Tensor]:
    """a0, a1, a2, b0, b1, b2; x stands where nothing is read (a bias column reads row 0, and discards it)."""
    a = [x if pool.a is None else pool.a for pool in pools] + [x] * (MAX_SLICES - len(pools))
    b = [pool.b for pool in pools] + [x] * (MAX_SLICES - len(pools))
    return a + b


def _describable(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: 16-byte aligned rows of contiguous elements."""
    aligned = matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return matrix.stride(1) == 1 and aligned


def _described(matrix: Tensor, height: int, width: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [height, width])
