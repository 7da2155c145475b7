"""Embeddings of a packed batch: token rows and the deltas' prompt rows gathered into one buffer, in one pass."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bertology_serve.kernels.config import cdiv
from bertology_serve.kernels.launching import Int, Ptr, check_dtypes, jit

BLOCK_ROWS, BLOCK_COLUMNS = 8, 256


@jit
def embed_kernel(
    words: Ptr,  # [V, H]
    prompts: Ptr,  # [P, H]
    positions: Ptr,  # [positions, H]
    types: Ptr,  # [types, H]
    sources: Ptr, position_of: Ptr, type_of: Ptr,  # int32 [T]
    y: Ptr,  # [T, H]
    T: Int, H: Int,
    POSITIONS: tl.constexpr, TYPES: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
) -> None:  # fmt: skip
    """BM rows, BH columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    row = m < T
    mask = row[:, None] & (h < H)[None, :]
    source = tl.load(sources + m, mask=row, other=0).to(tl.int64)
    is_prompt = source < 0
    word = words + tl.where(is_prompt, 0, source)[:, None] * H + h[None, :]
    prompt = prompts + tl.where(is_prompt, -1 - source, 0)[:, None] * H + h[None, :]
    v = tl.load(word, mask=mask & (source >= 0)[:, None], other=0.0).to(tl.float32)
    v += tl.load(prompt, mask=mask & is_prompt[:, None], other=0.0).to(tl.float32)
    if POSITIONS:
        at = tl.load(position_of + m, mask=row, other=0).to(tl.int64)
        v += tl.load(positions + at[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
    if TYPES:
        kind = tl.load(type_of + m, mask=row, other=0).to(tl.int64)
        v += tl.load(types + kind[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m.to(tl.int64)[:, None] * H + h[None, :], v.to(y.dtype.element_ty), mask=mask)


def prompt_sources(ids: Tensor, prompt_rows: Tensor, prompt_vectors: Tensor) -> Tensor:
    """int32 [T]: token ids, and ``-1 - vector`` in the rows that take a vector of the prompt pool.

    ids [T], prompt_rows and prompt_vectors [V].
    """
    sources = ids.to(torch.int32, copy=True)
    sources[prompt_rows] = (-1 - prompt_vectors).to(torch.int32)
    return sources


def packed_embed_with_prompts(
    sources: Tensor,
    words: Tensor,
    prompts: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    types: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y [T, H]: word or prompt vector of each row, plus position and type embeddings where given; one rounding.

    sources int32 [T] as ``prompt_sources`` makes them; words [V, H]; prompts [P, H]; ``positions`` and ``types`` are
    (table [n, H], int32 indices [T]). Raises ValueError for shapes that do not fit.
    """
    tokens, hidden = sources.shape[0], words.shape[1]
    tables = {"words": words, "prompts": prompts, "positions": positions and positions[0], "types": types and types[0]}
    check_dtypes(**tables)
    for name, table in tables.items():
        if table is not None and (table.shape[1] != hidden or not table.is_contiguous()):
            raise ValueError(f"got {name} of shape {tuple(table.shape)}, expected contiguous rows of {hidden}")
    y = torch.empty(tokens, hidden, dtype=words.dtype, device=words.device)
    if tokens == 0:
        return y
    embed_kernel[(cdiv(tokens, BLOCK_ROWS), cdiv(hidden, BLOCK_COLUMNS))](
        words,
        prompts if prompts is not None else words,
        positions[0] if positions is not None else words,
        types[0] if types is not None else words,
        sources,
        positions[1] if positions is not None else sources,
        types[1] if types is not None else sources,
        y,
        tokens,
        hidden,
        POSITIONS=positions is not None,
        TYPES=types is not None,
        BM=BLOCK_ROWS,
        BH=BLOCK_COLUMNS,
        enable_fp_fusion=True,
        num_warps=4,
    )
    return y
