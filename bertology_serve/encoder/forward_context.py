"""The context of one forward pass: which delta owns which rows, and how each linear, norm and attention applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bertology_serve.encoder.attention import AttentionLayout, Bias, Group, packed_attention
from bertology_serve.encoder.bank import PREFIX, BankEntry, adapter, inner, scale
from bertology_serve.encoder.batch import BatchPlan, PackedBatch
from bertology_serve.kernels import dispatch
from bertology_serve.kernels.columns import Pools
from bertology_serve.kernels.dispatch import BatchColumns, Segments, lora_linear
from bertology_serve.kernels.segments import add_low_rank, add_scaled

P = ParamSpec("P")
R = TypeVar("R")


class DeltaRows(Protocol):
    """The rows of deltas: the resident ones (``DeltaBank``) or those under training (``LiveBank``)."""

    entries: dict[str, BankEntry]

    def layer(self, pool: str, column: str, layer: int) -> Tensor:
        """One layer of a pool's column [P, width]."""
        ...


@dataclass(frozen=True)
class SlotPlace:
    """Where a wrapped module stands: a slot, a layer, and the columns of its output that the slot names."""

    slot: str
    layer: int
    part: tuple[int, int] | None = None


class HeadAttention(Protocol):
    """Computes attention in place of torch, layer by layer: what analyses watch and gate heads with."""

    def __call__(
        self, layer: int, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """See ``attention.Attend``."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """One batch on its way through the encoder; ``lists`` are the kernels' column lists, shared by all layers."""

    batch: PackedBatch
    plan: BatchPlan
    pools: DeltaRows
    layout: AttentionLayout | None
    lists: BatchColumns
    heads: HeadAttention | None = None

    @property
    def extents(self) -> list[tuple[int, int]]:
        return list(zip(self.batch.starts, self.batch.lengths, strict=True))

    def attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None,
        bias: Bias | None = None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """query, key, value [T, heads, D] -> [T, heads * D]: every row sees its own sequence and prefix."""
        if self.layout is None:
            raise RuntimeError("attention of our own takes packed rows only")
        return packed_attention(
            query,
            key,
            value,
            self.layout,
            scale=scale,
            window=window,
            prefix=self.prefix(layer),
            bias=bias,
            dropout=dropout,
            attend=None if self.heads is None else partial(self.heads, layer),
        )

    def changing(self, slots: Sequence[str]) -> tuple[list[str], list[int]]:
        """The deltas that change one of the slots, and for each sequence the number of its own, from 1; else 0."""
        entries = self.batch.entries
        keys = list(dict.fromkeys(entry.key for entry in entries if any(slot in entry.rows for slot in slots)))
        numbers = {key: number for number, key in enumerate(keys, 1)}
        return keys, [numbers.get(entry.key, 0) for entry in entries]

    def alone(self, delta: str, slot: str, layer: int, x: Tensor | None, y: Tensor) -> Tensor:
        """y [n, N] with what one delta does to a slot, for rows x [n, K] that belong to no sequence."""
        template = next(entry for entry in self.batch.entries if entry.key == delta).rows.get(slot)
        if template is None:
            return y
        return self.update(SlotPlace(slot, layer), x, y.clone(), [replace(template, lo=0, hi=y.shape[0])])

    def outside(self, slot: str, y: Tensor) -> Tensor:
        return self.update(SlotPlace(slot, 0), None, y)

    def linear(self, places: Sequence[SlotPlace], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, N] = x [T, K] Wᵀ + bias with the low ranks and biases of the places: one launch where it can be."""
        slices = None if self.scales(places) else self._slices(places, weight)
        if slices is not None:
            return lora_linear(x, weight, bias, *slices, self.lists)
        return self.updated(places, x, F.linear(x, weight, bias))

    def updated(self, places: Sequence[SlotPlace], x: Tensor, y: Tensor) -> Tensor:
        """The base's y [T, N] for x [T, K] with the low ranks and biases of the places."""
        for place in places:
            y = self.update(place, x, self._scaled(place, y))
        return y

    def scales(self, places: Sequence[SlotPlace]) -> bool:
        """Whether a delta of the batch scales the outputs of one of the places."""
        return any(scale(place.slot) in self.plan.segments for place in places)

    def gates(self, places: Sequence[SlotPlace]) -> bool:
        """Whether a delta of the batch scales the inputs of one of the places."""
        return any(inner(place.slot) in self.plan.segments for place in places)

    def gated(self, places: Sequence[SlotPlace], x: Tensor) -> Tensor:
        """The input x [T, K] of a linear, times the factors of the deltas that scale it."""
        for place in places:
            segments = self.plan.active(inner(place.slot), place.layer)
            if segments:
                self.lists.by_host()
                pool = _wide(self.pools.layer(inner(place.slot), "g", place.layer), x.shape[1])
                return add_scaled(x if torch.is_grad_enabled() else x.clone(), x, pool, segments)
        return x

    def _scaled(self, place: SlotPlace, y: Tensor) -> Tensor:
        """The base's output y [T, N] of a linear, times the factors of the deltas that scale it."""
        segments = self.plan.active(scale(place.slot), place.layer)
        if not segments:
            return y
        self.lists.by_host()
        lo, hi = place.part or (0, y.shape[1])
        pool = _wide(self.pools.layer(scale(place.slot), "g", place.layer), hi - lo)
        if place.part is None:
            return add_scaled(y, y, pool, segments)
        columns = add_scaled(y[:, lo:hi], y[:, lo:hi], pool, segments)
        return torch.cat([y[:, :lo], columns, y[:, hi:]], 1) if torch.is_grad_enabled() else y

    def _slices(self, places: Sequence[SlotPlace], weight: Tensor) -> tuple[list[Pools], list[Segments]] | None:
        """Pools and segments of the equal slices of a linear's outputs (its weight [N, K]), one for each place.

        ``None`` where no delta of the batch changes the linear, or the places do not divide it evenly.
        """
        found = [self.plan.active(place.slot, place.layer) for place in places]
        width = weight.shape[0]
        step = width // max(1, len(places))
        even = [(at, at + step) for at in range(0, width, step)]
        if not any(found) or [place.part or (0, width) for place in places] != even:
            return None
        absent = Pools(None, weight.new_zeros(1, step)) if not all(found) else None
        pools = [
            self._slot_pools(place, part, weight.shape[1], step) if part or absent is None else absent
            for place, part in zip(places, found, strict=True)
        ]
        return pools, found

    def update(self, place: SlotPlace, x: Tensor | None, y: Tensor, segments: Segments | None = None) -> Tensor:
        """Adds the low ranks and biases of a slot to its output y [T, N], given its input x [T, K]."""
        active = self.plan.active(place.slot, place.layer) if segments is None else segments
        if not active:
            return y
        self.lists.by_host()
        lo, hi = place.part or (0, y.shape[1])
        a, b = self._slot_pools(place, active if x is not None else (), 0 if x is None else x.shape[1], hi - lo)
        if len(active) > 1 and y.device.type == "cpu" and y.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            width = b.shape[1] + (0 if a is None else a.shape[1])
            for group in self.lists.groups(active, width, y.dtype):
                group.add(y[:, lo:hi], x, a, b)
            return y
        if place.part is None:
            return add_low_rank(y, x, a, b, active)
        columns = add_low_rank(y[:, lo:hi], x, a, b, active)
        return torch.cat([y[:, :lo], columns, y[:, hi:]], 1) if torch.is_grad_enabled() else y

    def norm(self, place: SlotPlace, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm of x [T, H] with the slot's biases, and its differences of the weight."""
        active = self.plan.active(place.slot, place.layer)
        pool = self.pools.layer(place.slot, "b", place.layer) if active else None
        y = dispatch.norm(x, norm.weight, norm.bias, norm.eps, None, pool, active, self.lists)
        scaled = self.plan.active(scale(place.slot), place.layer)
        if not scaled:
            return y
        self.lists.by_host()
        normed = F.layer_norm(x, norm.normalized_shape, None, None, norm.eps).to(y.dtype)
        return add_scaled(y, normed, self.pools.layer(scale(place.slot), "g", place.layer), scaled)

    def adapted(self, place: SlotPlace, residual: Tensor, source: Tensor) -> Tensor:
        """residual [T, H] plus ``act(source Dᵀ + b_d) U + b_u`` for the rows that have an adapter here.

        residual itself where none has.
        """
        name, layer = adapter(place.slot), place.layer
        segments = self.plan.active(name, layer)
        if not segments:
            return residual
        down, shift, up = (self.pools.layer(name, column, layer) for column in ("down", "down_bias", "up"))
        return dispatch.adapters(residual, source, down, shift, up, segments, self.lists)

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The pools [P, H] of prefix keys and values of a layer, ``None`` where no sequence has a prefix."""
        if PREFIX not in self.plan.segments:
            return None
        return self.pools.layer(PREFIX, "k", layer), self.pools.layer(PREFIX, "v", layer)

    def _slot_pools(self, place: SlotPlace, segments: Segments, inputs: int, outputs: int) -> Pools:
        """A slot's pools in one layer, as wide as it is there; without A where the segments have biases only."""
        ranked = any(segment.last > segment.first for segment in segments)
        a = _wide(self.pools.layer(place.slot, "a", place.layer), inputs) if ranked else None
        return Pools(a, _wide(self.pools.layer(place.slot, "b", place.layer), outputs))


def _wide(pool: Tensor, width: int) -> Tensor:
    """A pool [P, N] cut to a layer's width: layers of pruned encoders differ. Kernels want rows without gaps."""
    if pool.shape[1] == width:
        return pool
    return pool[:, :width].contiguous() if pool.is_cuda else pool[:, :width]


class CurrentContext:
    """Holds the context of the pass under way; every wrapped module of an encoder refers to the same one."""

    def __init__(self) -> None:
        self.value: ForwardContext | None = None

    @contextmanager
    def during(self, now: ForwardContext | None) -> Iterator[None]:
        """While it holds, ``now`` is under way; then what was before."""
        before, self.value = self.value, now
        try:
            yield
        finally:
            self.value = before


@contextmanager
def recomputed(modules: Sequence[nn.Module], current: CurrentContext) -> Iterator[None]:
    """While it holds, the modules keep nothing for the backward pass but their inputs: they run twice, with the same
    dropout, and their gradients have the same bits (for the same batch, on the same CPU with as many threads). Without
    gradients nothing is changed."""
    with ExitStack() as stack:
        for module in modules if torch.is_grad_enabled() else ():
            assert "forward" not in vars(module)
            module.forward = _twice(module.forward, current)
            stack.callback(delattr, module, "forward")
        yield


def _twice(forward: Callable[P, R], current: CurrentContext) -> Callable[P, R]:
    def run(*inputs: P.args, **named: P.kwargs) -> R:
        now = current.value

        def again(*inputs: P.args, **named: P.kwargs) -> R:
            with current.during(now):
                return forward(*inputs, **named)

        out: R = checkpoint(again, *inputs, use_reentrant=False, **named)  # type: ignore[arg-type]
        return out

    return run
