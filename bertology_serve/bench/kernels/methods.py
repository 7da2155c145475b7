"""Ways to compute one linear with many deltas: ours, and what it is measured against, in the same process."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.bench.kernels.workload import Inputs, Workload
from bertology_serve.kernels.columns import tile_columns
from bertology_serve.kernels.dispatch import (
    BatchColumns,
    LinearPath,
    architecture,
    choose,
    tile_width,
    torch_linear,
    typical,
)
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kernels.tuning import SPLIT, TORCH, Config

Call = Callable[[Inputs], Tensor]
BASELINE, OURS, PLAIN = "cublas", "ours", "own_base"
MOST_MERGED = 64
PAIR_TILE = 32  # rows: as small as the unfused pairs of multi-LoRA servers take them, for more programs


def methods(workload: Workload, segments: list[RowSegment], device: torch.device, also: str = "") -> dict[str, Call]:
    """Every way that this workload allows, by name; ``also`` adds MODULE:FUNCTION, called with these arguments."""
    choice = chosen(workload, segments, device)
    ways: dict[str, Call] = {
        BASELINE: lambda i: F.linear(i.x, i.w, i.bias),
        OURS: form(choice, workload, segments, device),
        "torch_loop": lambda i: torch_linear(i.x, i.w, i.bias, i.pools, [segments]),
    }
    if choice.form != TORCH:
        ways[PLAIN] = plain(choice.config)
    if choice.form != TORCH and segments:
        ways["cublas_pair"] = pair(workload, segments, device)
    if segments and _grouped() is not None and workload.dtype == "bfloat16" and workload.rank % 8 == 0:
        ways["grouped_mm"] = grouped(segments, device)
    if 0 < len(segments) <= MOST_MERGED:
        ways["merged"] = merged(segments)
    if also:
        module, _, function = also.partition(":")
        ways[also] = getattr(importlib.import_module(module), function)(workload, segments, device)
    return ways


def chosen(workload: Workload, segments: list[RowSegment], device: torch.device) -> LinearPath:
    """What dispatch picks for a workload."""
    arch, reason = architecture(device)
    if not arch:
        return LinearPath(TORCH, Config(), reason)
    columns = typical(*tile_width(segments, workload.rows))
    return choose(arch, getattr(torch, workload.dtype), workload.k, workload.n, 1, workload.rows, columns)


def form(choice: LinearPath, workload: Workload, segments: list[RowSegment], device: torch.device) -> Call:
    """The call of one form in one configuration; its column lists are made here, once, as for all layers."""
    if choice.form == TORCH:
        return lambda i: torch_linear(i.x, i.w, i.bias, i.pools, [segments])
    from bertology_serve.kernels.fused_lora_linear import fused_lora_linear
    from bertology_serve.kernels.shrink_expand import split_lora_linear

    columns = BatchColumns(workload.rows, device).get([segments], choice.config.block_m)
    run = split_lora_linear if choice.form == SPLIT else fused_lora_linear
    return lambda i: run(i.x, i.w, i.bias, i.pools, columns, "", choice.config)


def plain(config: Config) -> Call:
    """Our kernel with LoRA off."""
    from bertology_serve.kernels.fused_lora_linear import fused_lora_linear

    return lambda i: fused_lora_linear(i.x, i.w, i.bias, config=config)


def pair(workload: Workload, segments: list[RowSegment], device: torch.device) -> Call:
    """cuBLAS, then a shrink and an expand launch that adds to y in memory."""
    from bertology_serve.kernels.shrink_expand import lora_expand, segmented_lora_shrink

    config = Config(PAIR_TILE, 128, 64, 16 if workload.rank <= 16 else 32 if workload.rank <= 32 else 64, 1, 4, 3)
    columns = tile_columns([segments], workload.rows, PAIR_TILE).to(device)

    def run(i: Inputs) -> Tensor:
        s = segmented_lora_shrink(i.x, i.pools, columns, config)
        return lora_expand(F.linear(i.x, i.w, i.bias), s, i.pools, columns, config)

    return run


def merged(segments: list[RowSegment]) -> Call:
    """One matrix product per delta with weights W + BA that were merged beforehand, into one output."""

    def weights(i: Inputs) -> list[Tensor]:
        a, b = i.pools[0]
        assert a is not None
        return [i.w + (b[s.first : s.last].T.float() @ a[s.first : s.last].float()).to(i.w.dtype) for s in segments]

    ready = _beforehand(weights)

    def run(i: Inputs) -> Tensor:
        y = i.x.new_empty(i.x.shape[0], i.w.shape[0])
        for s, w in zip(segments, ready(i), strict=True):
            torch.addmm(i.bias, i.x[s.lo : s.hi], w.T, out=y[s.lo : s.hi])
        return y

    return run


def grouped(segments: list[RowSegment], device: torch.device) -> Call:
    """cuBLAS, then torch's grouped_mm for xA and for sB over stacks of the batch's deltas, made beforehand."""
    product = _grouped()
    assert product is not None
    ends = torch.tensor([s.hi for s in segments], dtype=torch.int32, device=device)
    rows = torch.tensor([list(range(s.first, s.last)) for s in segments], device=device)

    def stacks(i: Inputs) -> list[Tensor]:
        a, b = i.pools[0]
        assert a is not None
        return [a[rows].transpose(1, 2), b[rows]]  # [G, K, R], [G, R, N]

    ready = _beforehand(stacks)

    def run(i: Inputs) -> Tensor:
        a, b = ready(i)
        return F.linear(i.x, i.w, i.bias).add_(product(product(i.x, a, offs=ends), b, offs=ends))

    return run


def _beforehand(make: Callable[[Inputs], list[Tensor]]) -> Callable[[Inputs], list[Tensor]]:
    """``make`` of each input set, computed when it is first asked for: in the warm-up, never while timing."""
    made: dict[int, list[Tensor]] = {}

    def get(i: Inputs) -> list[Tensor]:
        if id(i) not in made:
            made[id(i)] = make(i)
        return made[id(i)]

    return get


def _grouped() -> Callable[..., Tensor] | None:
    found: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    return found


def exact(i: Inputs, segments: list[RowSegment], rows: int) -> Tensor:
    """The first rows of the output in float64."""
    a, b = i.pools[0]
    assert a is not None
    y = F.linear(i.x[:rows].double(), i.w.double(), i.bias.double())
    for s in segments:
        part = slice(s.lo, min(s.hi, rows))
        if s.lo < rows:
            y[part] += i.x[part].double() @ a[s.first : s.last].double().T @ b[s.first : s.last].double()
    return y
