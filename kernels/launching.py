"""What the Triton kernels share: the typed decorator, and shape checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Callable[[Callable[..., Any]], Any] = triton.jit
Ptr = Int = Block = tl.tensor
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
