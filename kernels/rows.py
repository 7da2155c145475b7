"""What is not a linear, by the best way here: adapters and LayerNorm, on a GPU or by torch.

Each function takes segments, as the plan has them, runs the kernel of that name on a GPU and torch elsewhere, and while
gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.kernels.dispatch import DTYPES, BatchColumns, architecture
from bertology_serve.kernels.segments import RowSegment, add_low_rank, bottleneck, cuts
from bertology_serve.kernels.tuning import adapter_config

NORM_ROWS = 4


def adapters(
    residual: Tensor,
    source: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    segments: Sequence[RowSegment],
    batch: BatchColumns,
) -> Tensor:
    """y [T, H] = residual plus each segment's bottleneck adapter of source; activations may differ by segment.

    residual and source [T, H]; pools down [P, H], down_bias [P, 1], up [P, H].
    """
    if not on_kernels(residual):
        batch.by_host()
        if torch.is_grad_enabled():
            return _recorded_adapters(residual, source, down, down_bias, up, segments)
        y = residual.clone()
        for s in segments:
            y[s.lo : s.hi] += bottleneck(source[s.lo : s.hi], down, down_bias, up, s)
        return y
    from bertology_serve.kernels.bottleneck import grouped_bottleneck_adapter

    config = adapter_config(residual.dtype != torch.float32)
    for activation in dict.fromkeys(s.activation for s in segments):
        mine = batch.of_activation(segments, activation)
        columns = batch.get([mine], config.block_m)
        residual = grouped_bottleneck_adapter(residual, source, down, down_bias, up, columns, activation, config)
    return residual


def _recorded_adapters(
    residual: Tensor, source: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, segments: Sequence[RowSegment]
) -> Tensor:
    """``adapters`` while gradients are recorded: rows are split once and joined once, whatever the segments."""
    segments = [segment for segment in segments if segment.hi > segment.lo]
    sizes, owners = cuts(residual.shape[0], segments)
    pieces, sources = list(torch.split(residual, sizes)), torch.split(source, sizes)
    for segment, at in zip(segments, owners, strict=True):
        pieces[at] = pieces[at] + bottleneck(sources[at], down, down_bias, up, segment)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    pool: Tensor | None = None,
    segments: Sequence[RowSegment] = (),
    batch: BatchColumns | None = None,
) -> Tensor:
    """y [T, H] = LayerNorm(x + residual) with each segment's bias: x and residual [T, H], pool [P, H]."""
    if not on_kernels(x):
        if segments and batch is not None:
            batch.by_host()
        y = F.layer_norm(x if residual is None else x + residual, x.shape[1:], weight, bias, eps)
        return y if pool is None else add_low_rank(y, None, None, pool, segments)
    from bertology_serve.kernels.layernorm import layer_norm

    columns = batch.get([segments], NORM_ROWS) if batch is not None and pool is not None and segments else None
    return layer_norm(x, weight, bias, eps, residual, pool, columns)


def on_kernels(tensor: Tensor) -> bool:
    """Whether kernels take this tensor: on a GPU that has them, in their dtypes, no gradients recorded, no autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(tensor.device.type):
        return False
    return tensor.dtype in DTYPES and bool(architecture(tensor.device)[0])
