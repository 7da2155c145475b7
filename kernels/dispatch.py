"""Which kernel runs a linear with rank columns, an adapter or a LayerNorm, and why.

For linears the choice is looked up by (architecture, dtype, K, N, T, rank columns) in committed tables and is never
searched for while serving. Without CUDA or without Triton, with dropout, while gradients are recorded, and where a
table says so, torch does it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.kernels.columns import Pools, TileColumns, tile_columns
from bertology_serve.kernels.segments import (
    ACTIVATIONS,
    RowSegment,
    SegmentGroup,
    add_low_rank,
    bottleneck,
    cuts,
    grouped,
)
from bertology_serve.kernels.tuning import COLUMNS, SPLIT, TORCH, Config, Point, adapter_config, table

DTYPES = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "float"}
TYPICAL = 4 / 3  # the widest tile counts up to this many times the mean: a rare wider one takes another chunk
WORTH_A_CALL = 10_000_000
"""Multiplications that a call of oneDNN's in bfloat16 costs as much time as: measured 30 µs, with AMX."""
Segments = Sequence[RowSegment]


@dataclass(frozen=True)
class LinearPath:
    """A form ("fused", "split" or "torch"), how it is launched, and the reason in words."""

    form: str
    config: Config
    why: str


class HostPath(Exception):
    """Raised where a batch's segments would be looped over by the host while its work is being recorded."""


class BatchColumns:
    """The column lists of one batch, made once for each set of slots and tile height and shared by all layers."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self._made: dict[tuple[tuple[int, ...], int], tuple[Sequence[Segments], TileColumns]] = {}
        self._widths: dict[int, tuple[Segments, int]] = {}
        self._picked: dict[tuple[int, str], tuple[Segments, list[RowSegment]]] = {}
        self._groups: dict[tuple[int, int], tuple[Segments, list[SegmentGroup]]] = {}

    def get(self, slices: Sequence[Segments], block_m: int) -> TileColumns:
        """The lists of these segment lists (told apart by identity, as the plan hands out the same ones)."""
        key = tuple(map(id, slices)), block_m
        if key not in self._made:
            self._made[key] = slices, tile_columns(slices, self.rows, block_m).to(self.device)
        return self._made[key][1]

    def by_host(self) -> None:
        """Called before torch loops over segments: what is recorded for other batches too raises HostPath here."""

    def columns(self, segments: Segments) -> int:
        """The number of columns that a launch over these segments is laid out for; counted once."""
        if id(segments) not in self._widths:
            self._widths[id(segments)] = segments, typical(*tile_width(segments, self.rows))
        return self._widths[id(segments)][1]

    def groups(self, segments: Segments, width: int, dtype: torch.dtype) -> list[SegmentGroup]:
        """The segments' products (of ``width`` K + N) put together where single ones are too small; made once."""
        key = id(segments), width
        if key not in self._groups:
            self._groups[key] = segments, grouped(segments, width, WORTH_A_CALL, dtype)
        return self._groups[key][1]

    def of_activation(self, segments: Segments, activation: str) -> list[RowSegment]:
        """The segments with one activation: the same list every time, as ``get`` asks for."""
        key = id(segments), activation
        if key not in self._picked:
            self._picked[key] = segments, [s for s in segments if s.activation == activation]
        return self._picked[key][1]


def architecture(device: torch.device) -> tuple[str, str]:
    """(table name, reason) for a device; the name is empty where torch must do the work."""
    if device.type != "cuda":
        return "", f"the device is {device.type}, and kernels need CUDA"
    if importlib.util.find_spec("triton") is None:
        return "", "Triton is not installed"
    return _table_of(torch.cuda.get_device_capability(device))


@cache
def _table_of(capability: tuple[int, int]) -> tuple[str, str]:
    major, minor = capability
    if major < 8:
        return "", f"sm_{major}{minor} has no bf16 matrix instructions; kernels need sm_80 or newer"
    if (major, minor) in ((9, 0), (10, 0), (10, 3)):
        return "sm_90", "" if major == 9 else f"sm_{major}{minor} has no table of its own; sm_90 is nearest"
    return "sm_80", "" if (major, minor) == (8, 0) else f"sm_{major}{minor} has no table of its own; sm_80 is nearest"


def typical(mean: float, widest: int) -> int:
    """The number of columns that a launch is laid out for."""
    return min(widest, math.ceil(TYPICAL * mean))


@cache
def _chosen(arch: str, kind: str, k: int, n: int, slices: int, bucket: int, columns: int) -> LinearPath:
    """The row of a table, looked for once: a lookup walks through all of them."""
    tables = table(arch)
    row = tables.nearest(Point(kind, k, n, slices, bucket, columns))
    near = row.point
    origin = ", ".join(f"{key} {value}" for key, value in tables.measured.items()) or "by rule, not measured"
    why = f"table {arch} ({origin}): nearest row K {near.k}, N {near.n}, T {near.rows}, columns {near.columns}"
    return LinearPath(row.form, row.config, why)


def choose(arch: str, dtype: torch.dtype, k: int, n: int, slices: int, rows: int, columns: int) -> LinearPath:
    """The committed choice at a point: T to the nearest power of two, ``columns`` (of ``typical``) up to a class."""
    kind = DTYPES.get(dtype)
    if kind is None or slices not in (1, 3):
        return LinearPath(TORCH, Config(), f"no kernel for {slices} slices of {dtype}")
    column_class = next((c for c in COLUMNS if columns <= c), COLUMNS[-1])
    bucket = 1 << round(math.log2(max(1, rows)))
    return _chosen(arch, kind, k, n, slices, bucket, column_class)


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pools: Sequence[Pools],
    slices: Sequence[Segments],
    batch: BatchColumns,
    activation: str = "",
) -> Tensor:
    """y [T, N] = act(x Wᵀ + bias + every segment's low-rank update and bias), by whatever is best here.

    x [T, K], w [N, K], bias [N]; ``pools`` and ``slices`` one per equal slice of N. Differentiable. Under autocast all
    are taken in its dtype, as torch takes them.
    """
    choice = pick(x, w, slices, batch)
    if choice.form == TORCH:
        if any(slices):
            batch.by_host()
        return torch_linear(x, w, bias, pools, slices, activation)
    if torch.is_autocast_enabled(x.device.type):
        kind = _computed_in(x)
        x, w, bias = x.to(kind), w.to(kind), None if bias is None else bias.to(kind)
        pools = [Pools(None if pool.a is None else pool.a.to(kind), pool.b.to(kind)) for pool in pools]
    columns = batch.get(slices, choice.config.block_m)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in _tensors(x, w, bias, pools)):
        from bertology_serve.kernels.autograd import differentiable_lora_linear

        y = differentiable_lora_linear(x, w, bias, pools, columns, choice.config)
        return ACTIVATIONS[activation](y) if activation else y
    if choice.form == SPLIT:
        from bertology_serve.kernels.shrink_expand import split_lora_linear

        return split_lora_linear(x, w, bias, pools, columns, activation, choice.config)
    from bertology_serve.kernels.fused_lora_linear import fused_lora_linear

    return fused_lora_linear(x, w, bias, pools, columns, activation, choice.config)


def pick(x: Tensor, w: Tensor, slices: Sequence[Segments], batch: BatchColumns) -> LinearPath:
    """What ``lora_linear`` does with these, and why."""
    arch, reason = architecture(x.device)
    if not arch:
        return LinearPath(TORCH, Config(), reason)
    if any(segment.dropout for part in slices for segment in part):
        return LinearPath(TORCH, Config(), "dropout acts on the update's input only, which kernels do not do")
    columns = max(map(batch.columns, slices), default=0)
    choice = choose(arch, _computed_in(x), x.shape[1], w.shape[0], len(slices), batch.rows, columns)
    return replace(choice, why=f"{choice.why}; {reason}") if reason else choice


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype that a product with x is done in: autocast's, else its own."""
    lowered = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype


def explain(x: Tensor, w: Tensor, slices: Sequence[Segments], batch: BatchColumns) -> str:
    """One line: what runs this linear, how it is launched, and why."""
    choice = pick(x, w, slices, batch)
    if choice.form == TORCH:
        return f"torch: {choice.why}"
    c = choice.config
    shape = f"{c.block_m}x{c.block_n}x{c.block_k}, RT {c.rank_tile}, sweep {c.sweep}"
    return f"{choice.form} {shape}, {c.warps} warps, {c.stages} stages{', TMA' if c.tma else ''}: {choice.why}"


def tile_width(segments: Segments, rows: int, block_m: int = 128) -> tuple[float, int]:
    """(mean, largest) number of columns in tiles of 128 rows: what the tables' ``columns`` counts."""
    tiles = max(1, -(-rows // block_m))
    counts = [0] * tiles
    for segment in segments:
        if segment.hi > segment.lo:
            width = segment.last - segment.first + (segment.bias >= 0)
            for tile in range(segment.lo // block_m, (segment.hi - 1) // block_m + 1):
                counts[tile] += width
    return sum(counts) / tiles, max(counts)


def torch_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pools: Sequence[Pools],
    slices: Sequence[Segments],
    activation: str = "",
) -> Tensor:
    """The same with torch alone: base product, then a loop over segments."""
    y = F.linear(x, w, bias)
    parts = torch.split(y, w.shape[0] // max(1, len(slices)), 1)
    done = [
        add_low_rank(part, x, pool.a, pool.b, segments)
        for part, pool, segments in zip(parts, pools, slices, strict=bool(slices))
    ]
    if len(done) == 1:
        y = done[0]
    elif torch.is_grad_enabled() and done:  # otherwise y changed in place
        y = torch.cat(done, 1)
    return ACTIVATIONS[activation](y) if activation else y


def _tensors(x: Tensor, w: Tensor, bias: Tensor | None, pools: Sequence[Pools]) -> list[Tensor | None]:
    return [x, w, bias, *(tensor for pool in pools for tensor in pool)]


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
