"""The packed forward as CUDA graphs: one launch a batch instead of hundreds.

A graph is recorded once for a *shape* (token bucket, number of sequences, longest one, prompt and prefix rooms, which
slots are changed and how many rank columns their tiles typically have) and replayed for every batch of that shape, with
other deltas, counts and lengths: everything that differs lies in tensors at fixed addresses. Rows beyond the batch
belong to filler sequences; heads run outside. What is recorded is the very pass that runs without graphs, so that a
replay gives its bits at the same bucket.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bertology_serve.encoder.attention import AttentionLayout, Room, extents
from bertology_serve.encoder.bank import PREFIX, PROMPT, DeltaBank, is_adapter
from bertology_serve.encoder.batch import BatchPlan, PackedBatch
from bertology_serve.encoder.forward_context import ForwardContext
from bertology_serve.kernels.columns import TileColumns, tile_columns
from bertology_serve.kernels.dispatch import BatchColumns, HostPath, Segments
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kernels.tuning import COLUMNS, RANK_TILES

SMALLEST, LARGEST = 64, 16384
Name = tuple[str, int, str] | None  # pool, layer (adapters only, else -1), activation; None: nothing is active
Compute = Callable[[ForwardContext], Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Runs a function so that it can be run again: (what runs it again, the tensor that it writes each time)."""


def bucket(rows: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, ... that holds so many rows: at most a third is filler."""
    power = max(SMALLEST, 1 << (rows - 1).bit_length())
    return power * 3 // 4 if rows <= power * 3 // 4 and power > SMALLEST else power


def power(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count``, and ``least``; 0 for 0."""
    return max(least, 1 << (count - 1).bit_length()) if count else 0


@dataclass(frozen=True)
class GraphShape:
    """What a graph is recorded for. ``room`` bounds rows, sequences, prefixes and lengths; ``prompts`` the prompt rows.

    ``active`` has each pool's name, the class of its column count, its activations, in which layers it acts alike,
    and where its tensors lie.
    """

    room: Room
    prompts: int
    active: tuple[tuple[object, ...], ...]


def shape_of(batch: PackedBatch, plan: BatchPlan, bank: DeltaBank, lists: BatchColumns) -> GraphShape:
    """The shape of a batch; ``lists`` are those of the batch."""
    prompts, virtual = batch.prompt_rows.numel(), sum(entry.prefix_length for entry in batch.entries)
    rows = bucket(batch.rows + (prompts > 0))  # prompts that fill their room need a row to go to
    longest = power(max(batch.lengths), 16)
    before = power(max(entry.prefix_length for entry in batch.entries))
    sequences = power(batch.sequences + math.ceil((rows - batch.rows) / longest), 8)
    active = tuple(_activity(name, segments, plan, bank, lists) for name, segments in sorted(plan.segments.items()))
    return GraphShape(Room(rows, sequences, power(virtual), longest, longest + before), power(prompts), active)


def _activity(
    name: str, segments: Segments, plan: BatchPlan, bank: DeltaBank, lists: BatchColumns
) -> tuple[object, ...]:
    columns = 0 if name in (PROMPT, PREFIX) else lists.columns(segments)
    column_class = next((c for c in COLUMNS if columns <= c), COLUMNS[-1])
    ranked = any(segment.last > segment.first for segment in segments)
    layers: tuple[int, ...] = ()
    if is_adapter(name):
        seen: dict[int, int] = {}
        alike = [plan.active(name, layer) for layer in range(bank.depth(name))]
        layers = tuple(seen.setdefault(id(part), i) if part else -1 for i, part in enumerate(alike))
    activations = tuple(sorted({segment.activation for segment in segments}))
    return name, column_class, ranked, activations, layers, bank.places(name)


class FixedColumns(BatchColumns):
    """Column lists at fixed addresses: made for one batch, filled again for others of its shape."""

    def __init__(self, rows: int, device: torch.device, plan: BatchPlan, depths: dict[str, int]) -> None:
        super().__init__(rows, device)
        self._fixed: dict[tuple[tuple[Name, ...], int], TileColumns] = {}
        self._names: dict[int, Name] = {}
        self._plan = plan  # names are those of its lists, which must not go
        for name, segments in plan.segments.items():
            self._names[id(segments)] = (name, -1, "")
            for layer in reversed(range(depths.get(name, 0))):  # lists that layers share bear the first one's number
                self._names[id(plan.active(name, layer))] = (name, layer, "")

    def get(self, slices: Sequence[Segments], block_m: int) -> TileColumns:
        """The fixed lists of these segments."""
        key = tuple(self._names.get(id(part)) for part in slices), block_m
        if key not in self._fixed:
            needed = tile_columns(slices, self.rows, block_m)
            roomy = tile_columns(slices, self.rows, block_m, power(2 * needed.count, 64))
            self._fixed[key] = replace(roomy, widest=power(needed.widest, RANK_TILES[0])).to(self.device)
        return self._fixed[key]

    def of_activation(self, segments: Segments, activation: str) -> list[RowSegment]:
        """The segments with one activation, under a name of their own."""
        picked = super().of_activation(segments, activation)
        name = self._names.get(id(segments))
        if name is not None:
            self._names[id(picked)] = (*name[:2], activation)
        return picked

    def by_host(self) -> None:
        """Raises HostPath."""
        raise HostPath("this pass loops over segments on the host")

    def fill(self, plan: BatchPlan) -> None:
        """The lists of another batch of the same shape. Raises ValueError where they do not fit."""
        fresh = [
            (fixed, tile_columns([_named(plan, name) for name in names], self.rows, block_m, fixed.capacity))
            for (names, block_m), fixed in self._fixed.items()
        ]
        for fixed, columns in fresh:
            columns.to(self.device).write_into(fixed)


def _named(plan: BatchPlan, name: Name) -> Segments:
    if name is None:
        return ()
    pool, layer, activation = name
    segments = plan.segments[pool] if layer < 0 else plan.active(pool, layer)
    return [s for s in segments if s.activation == activation] if activation else segments


class Recorded:
    """One graph with the tensors that it reads."""

    def __init__(
        self, shape: GraphShape, batch: PackedBatch, plan: BatchPlan, bank: DeltaBank, compute: Compute, record: Record
    ) -> None:
        self.shape, device = shape, batch.ids.device
        rows, prompts = shape.room.rows, shape.prompts
        self._rows = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._prompts = torch.zeros(2, prompts, dtype=torch.int64, device=device)
        self._extents = extents(batch, shape.room)
        depths = {name: bank.depth(name) for name in plan.segments if is_adapter(name)}
        self._lists = FixedColumns(rows, device, plan, depths)
        static = replace(
            batch,
            ids=self._rows[0],
            types=self._rows[1],
            positions=self._rows[2],
            prompt_rows=self._prompts[0],
            prompt_vectors=self._prompts[1],
        )
        self._fill_rows(batch)
        now = ForwardContext(static, plan, bank, AttentionLayout(None, None, (), self._extents), self._lists)
        self._replay, self._hidden = record(lambda: compute(now))

    def run(self, batch: PackedBatch, plan: BatchPlan) -> Tensor:
        """The hidden states [T, H] of another batch of the shape; ValueError where its column lists do not fit."""
        self._lists.fill(plan)
        self._fill_rows(batch)
        self._extents.copy_(extents(batch, self.shape.room))
        self._replay()
        return self._hidden.view(self.shape.room.rows, -1)[: batch.rows].clone()

    def _fill_rows(self, batch: PackedBatch) -> None:
        count, prompts = batch.rows, batch.prompt_rows.numel()
        for target, source in zip(self._rows, (batch.ids, batch.types, batch.positions), strict=True):
            target[:count].copy_(source)
            target[count:] = source[0]
        self._prompts[0, prompts:] = self.shape.room.rows - 1
        self._prompts[1, prompts:] = 0
        self._prompts[0, :prompts].copy_(batch.prompt_rows)
        self._prompts[1, :prompts].copy_(batch.prompt_vectors)


class Graphs:
    """Graphs by shape, the longest unused one dropped beyond ``limit``; so are shapes that no graph can be made for."""

    def __init__(self, compute: Compute, record: Record | None = None, limit: int = 64) -> None:
        self.compute, self.limit = compute, limit
        self.record = record or CudaRecorder()
        self._made: OrderedDict[GraphShape, Recorded] = OrderedDict()
        self._unfit: OrderedDict[GraphShape, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[GraphShape]:
        return iter(self._made)

    @torch.inference_mode()
    def run(self, batch: PackedBatch, plan: BatchPlan, bank: DeltaBank) -> Tensor | None:
        """The hidden states [T, H]; ``None`` for a batch that is too long for a graph, or needs the host's help."""
        if batch.rows >= LARGEST:
            return None
        shape = shape_of(batch, plan, bank, BatchColumns(batch.rows, batch.ids.device))
        if shape in self._unfit:
            self._unfit.move_to_end(shape)
            return None
        if shape in self._made:
            self._made.move_to_end(shape)
            try:
                return self._made[shape].run(batch, plan)
            except ValueError:  # more columns than there is room for: recorded again, with more
                del self._made[shape]
        try:
            self._made[shape] = Recorded(shape, batch, plan, bank, self.compute, self.record)
        except HostPath:
            self._unfit[shape] = None
            if len(self._unfit) > self.limit:
                self._unfit.popitem(last=False)
            return None
        if len(self._made) > self.limit:
            self._made.popitem(last=False)
        return self._made[shape].run(batch, plan)


class CudaRecorder:
    """Records on a stream of its own, after one run that compiles and allocates; all graphs share memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = compute()
        return graph.replay, out
