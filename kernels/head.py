"""Classifiers of many deltas over the rows of one batch, each with labels of its own number, in one launch."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.activations import activate
from bertology_serve.kernels.launching import Int, Ptr, check_dtypes, check_matrix, jit

BLOCK_LABELS, BLOCK_K = 16, 128


@jit
def head_kernel(
    x: Ptr,  # [S, H]
    weights: Ptr,  # [P, H], one row per label of a delta
    bias: Ptr,  # [P]
    firsts: Ptr, counts: Ptr,  # int32 [S]: the labels of each row's delta
    begins: Ptr,  # int32 [S]: where each row's outputs begin
    out: Ptr,  # [sum of counts]
    H: Int, stride_x: Int,
    ACTIVATION: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """All labels of one row, BC at a time."""
    s = tl.program_id(0)
    first = tl.load(firsts + s).to(tl.int64)
    count = tl.load(counts + s)
    begin = tl.load(begins + s).to(tl.int64)
    for c in range(0, count, BC):
        label = c + tl.arange(0, BC)
        acc = tl.zeros([BC], tl.float32)
        for k0 in range(0, H, BK):
            k = k0 + tl.arange(0, BK)
            row = tl.load(x + s.to(tl.int64) * stride_x + k, mask=k < H, other=0.0).to(tl.float32)
            mask = (label < count)[:, None] & (k < H)[None, :]
            w = tl.load(weights + (first + label)[:, None] * H + k[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += tl.sum(w * row[None, :], 1)
        acc += tl.load(bias + first + label, mask=label < count, other=0.0).to(tl.float32)
        tl.store(out + begin + label, activate(acc, ACTIVATION).to(out.dtype.element_ty), mask=label < count)


def grouped_head(
    x: Tensor, weights: Tensor, bias: Tensor, firsts: Tensor, counts: Tensor, total: int, activation: str = ""
) -> tuple[Tensor, Tensor]:
    """(flat outputs [total], begins int32 [S]): row s has ``counts[s]`` outputs from ``begins[s]`` on.

    x [S, H]; pools weights [P, H] and bias [P]; firsts and counts int32 [S] say which pool rows are the labels of a
    row's delta; ``total`` is the sum of counts, which the host knows. Raises ValueError for shapes that do not fit.
    """
    rows, hidden = x.shape
    check_matrix("x", x)
    check_dtypes(x=x, weights=weights, bias=bias)
    if weights.shape != (bias.numel(), hidden) or not weights.is_contiguous() or not len(firsts) == len(counts) == rows:
        raise ValueError(
            f"got weights {tuple(weights.shape)}, bias {tuple(bias.shape)}, {len(firsts)} firsts and {len(counts)} "
            f"counts for x {tuple(x.shape)}; expected weights [P, {hidden}], bias [P], {rows} of each"
        )
    begins = (counts.cumsum(0) - counts).to(torch.int32)
    out = torch.empty(total, dtype=x.dtype, device=x.device)
    if rows:
        head_kernel[(rows,)](
            x,
            weights,
            bias,
            firsts,
            counts,
            begins,
            out,
            hidden,
            x.stride(0),
            ACTIVATION=activation,
            BC=BLOCK_LABELS,
            BK=BLOCK_K,
            enable_fp_fusion=True,
            num_warps=4,
        )
    return out, begins
