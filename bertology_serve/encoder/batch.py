"""Packs tokenised sequences of many deltas into one batch of unpadded rows, and plans which pool rows act on which.

Sequences of one delta lie next to each other, the shorter ones first. Where an encoder cannot be packed, the same
structure holds padded rows: sequence i then owns rows ``i * stride`` to ``(i + 1) * stride``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bertology_serve.encoder.bank import PROMPT, BankEntry
from bertology_serve.errors import LimitError
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import Head, pool
from bertology_serve.tasks.spec import Encoding, TaskSpec

Ints: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PackedBatch:
    """T rows of S sequences; row tensors are int64.

    ``ids``, ``types``, ``positions`` [T]; ``starts`` and ``lengths`` [S] of each sequence's rows, prompts included,
    padding not; ``stride`` is 0 for packed batches, else Lmax. ``text_rows`` are the rows of text in order,
    ``text_lengths`` [S] how many each sequence has, ``first_rows`` [S] the row that a [CLS] head reads.
    ``prompt_rows`` are rows that take the vectors ``prompt_vectors`` of the prompt pool. ``entries`` [S] is each
    sequence's place in the bank; ``order[i]`` the caller's index of packed sequence i.

    Where several sequences of one text share the lower layers, this batch runs those, and ``forks`` what comes after.
    """

    ids: Tensor
    types: Tensor
    positions: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    stride: int
    text_rows: Tensor
    text_lengths: tuple[int, ...]
    first_rows: Tensor
    prompt_rows: Tensor
    prompt_vectors: Tensor
    entries: tuple[BankEntry, ...]
    order: tuple[int, ...]
    forks: tuple[Fork, ...] = ()

    @property
    def last(self) -> PackedBatch:
        """The batch of the uppermost layers, whose rows come out; itself without forks. Alone it gives the same."""
        return self.forks[-1].batch if self.forks else self

    @property
    def rows(self) -> int:
        """T: rows in the batch, padding included."""
        return self.ids.shape[0]

    @property
    def sequences(self) -> int:
        """S: sequences in the batch."""
        return len(self.lengths)

    @property
    def places(self) -> list[int]:
        """The packed sequences in the order in which they were given."""
        return sorted(range(self.sequences), key=self.order.__getitem__)


@dataclass(frozen=True)
class Fork:
    """From ``layer`` on it is ``batch`` that runs: its rows are copies of ``rows`` [T], int64, of the batch before."""

    layer: int
    batch: PackedBatch
    rows: Tensor

    def copied(self, rows: Tensor) -> Tensor:
        """[1, T, ...] of the batch before, as of this one."""
        return rows.index_select(1, self.rows)


def rows_of(encoding: Encoding, entry: BankEntry) -> int:
    """Rows that a sequence takes in a batch: its tokens and its delta's prompt."""
    return len(encoding) + entry.prompt_length


def pack(
    encodings: Sequence[Encoding],
    entries: Sequence[BankEntry],
    anatomy: Anatomy,
    device: torch.device,
    padded: bool = False,
) -> PackedBatch:
    """One batch of all sequences; raises LimitError for a sequence that the encoder has no positions for."""
    ranks, layouts = _layouts(entries)
    tokens = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    ordered = np.lexsort((tokens + layouts[0], ranks))  # by delta, the shorter ones first
    order = ordered.tolist()
    encodings, entries = [encodings[i] for i in order], [entries[i] for i in order]
    tokens, (virtual, shift, first_vector, *flags) = tokens[ordered], layouts[:, ordered]
    before, shifted, reads_first = (flag > 0 for flag in flags)
    lengths = tokens + virtual
    _check_positions(tokens, virtual + shift, np.where(shifted, virtual, 0) + shift, anatomy)
    stride = int(lengths.max()) if padded else 0
    starts = np.arange(len(order)) * stride if padded else lengths.cumsum() - lengths
    total = stride * len(order) if padded else int(lengths.sum())

    count, prompts = int(tokens.sum()), int(virtual.sum())
    sizes = (total, total, total, count, len(order), prompts, prompts)
    block = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    ids, types, positions, text_rows, firsts, prompt_rows, prompt_vectors = np.split(
        block.numpy(), np.cumsum(sizes[:-1])
    )
    owner, within = _numbered(tokens)
    after = np.where((within > 0) | before[owner], virtual[owner], 0)  # prompt rows before each token
    text_rows[:] = starts[owner] + within + after
    ids[text_rows] = np.fromiter(chain.from_iterable([e.ids for e in encodings]), np.int64, count)
    if any(map(any, [e.types for e in encodings])):
        types[text_rows] = np.fromiter(chain.from_iterable(e.types for e in encodings), np.int64, count)
    offset = anatomy.position_offset + shift
    positions[text_rows] = offset[owner] + within + np.where(shifted[owner], after, 0)
    firsts[:] = starts + np.where(before & ~reads_first, virtual, 0)
    owner, within = _numbered(virtual)
    row = within + ~before[owner]
    prompt_rows[:] = starts[owner] + row
    positions[prompt_rows] = offset[owner] + np.where(shifted[owner], row, 0)
    prompt_vectors[:] = first_vector[owner] + within

    parts = torch.split(block.to(device, non_blocking=True), list(sizes))  # one copy
    return PackedBatch(
        ids=parts[0],
        types=parts[1],
        positions=parts[2],
        starts=tuple(starts.tolist()),
        lengths=tuple(lengths.tolist()),
        stride=stride,
        text_rows=parts[3],
        text_lengths=tuple(tokens.tolist()),
        first_rows=parts[4],
        prompt_rows=parts[5],
        prompt_vectors=parts[6],
        entries=tuple(entries),
        order=tuple(order),
    )


def _layouts(entries: Sequence[BankEntry]) -> tuple[list[int], Ints]:
    """Each sequence's delta by number, as they first come; and [6, S] of those deltas: prompt rows, how far a prefix
    moves positions, the first prompt vector; whether prompts stand before all text, whether positions count them, and
    whether a [CLS] head reads the first row."""
    numbers: dict[str, int] = {}
    rows = []
    for entry in entries:
        if entry.key not in numbers:
            numbers[entry.key] = len(numbers)
            prompt, prefix = entry.prompt, entry.prefix
            rows.append((
                entry.prompt_length,
                entry.prefix_length if prefix is not None and prefix.positions == "shifted" else 0,
                entry.rows[PROMPT].first if PROMPT in entry.rows else 0,
                prompt is None or prompt.placement == "before_cls",
                prompt is not None and prompt.positions == "shifted",
                prompt is not None and prompt.head_reads == "first_row",
            ))  # fmt: skip
    ranks = [numbers[entry.key] for entry in entries]
    return ranks, np.array(rows, np.int64).reshape(-1, 6)[ranks].T


def _numbered(counts: Ints) -> tuple[Ints, Ints]:
    """For counts [S]: which of the S each of their sum belongs to, and its number within that."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def _check_positions(tokens: Ints, virtual: Ints, counted: Ints, anatomy: Anatomy) -> None:
    [over] = np.nonzero(tokens + counted > anatomy.max_tokens)
    if len(over):
        raise LimitError(
            f"a sequence of {tokens[over[0]]} tokens with {virtual[over[0]]} virtual ones does not fit the encoder's "
            f"{anatomy.max_tokens} positions; lower max_length"
        )


@dataclass(frozen=True)
class DeltaRun:
    """Consecutive sequences ``first`` to ``last`` of one delta, which own the rows ``lo`` to ``hi``."""

    entry: BankEntry
    first: int
    last: int
    lo: int
    hi: int


@dataclass(frozen=True)
class BatchPlan:
    """``runs``: the deltas of the batch in order. ``segments``: for each pool, its active row segments.

    ``partial`` are the pools that some delta does not use in every layer.
    """

    runs: tuple[DeltaRun, ...]
    segments: Mapping[str, Sequence[RowSegment]]
    partial: frozenset[str] = frozenset()
    _kept: dict[tuple[str, tuple[bool, ...]], list[RowSegment]] = field(default_factory=dict)

    def active(self, pool: str, layer: int) -> Sequence[RowSegment]:
        """The segments of a pool whose deltas use it in a layer: the same list for the same deltas."""
        segments = self.segments.get(pool, ())
        if pool not in self.partial:
            return segments
        kept = tuple(_uses(run.entry, pool, layer) for run in self.runs if pool in run.entry.rows)
        if all(kept):
            return segments
        picked = [segment for segment, keep in zip(segments, kept, strict=True) if keep]
        return self._kept.setdefault((pool, kept), picked)


def _uses(entry: BankEntry, pool: str, layer: int) -> bool:
    return pool not in entry.layers or layer in entry.layers[pool]


def make_plan(batch: PackedBatch) -> BatchPlan:
    """The plan of a packed or padded batch."""
    runs = tuple(_runs(batch))
    segments: dict[str, list[RowSegment]] = {}
    for run in runs:
        for name, template in run.entry.rows.items():
            segments.setdefault(name, []).append(replace(template, lo=run.lo, hi=run.hi))
    return BatchPlan(runs, segments, frozenset(name for run in runs for name in run.entry.layers))


def _runs(batch: PackedBatch) -> Iterator[DeltaRun]:
    first = 0
    for i in range(1, batch.sequences + 1):
        if i == batch.sequences or batch.entries[i].key != batch.entries[first].key:
            hi = batch.starts[i] if i < batch.sequences else batch.rows
            yield DeltaRun(batch.entries[first], first, i, batch.starts[first], hi)
            first = i


def read(hidden: Tensor, batch: PackedBatch, sequences: Sequence[int], task: TaskSpec, head: Head) -> Tensor:
    """The head's output for packed sequences, in the order given.

    hidden [T, H]. Returns [S, C], for tasks that answer for every token [sum of text lengths, C], for embeddings
    [S, H], of ``sparse`` [S, V]; in the head's own precision, float32 unless it was moved.
    """
    rows = read_rows(hidden, batch, sequences, task)
    own = next((parameter.dtype for parameter in head.parameters()), torch.float32)
    return head.read(rows.to(own), [batch.text_lengths[i] for i in sequences], task)


def read_rows(hidden: Tensor, batch: PackedBatch, sequences: Sequence[int], task: TaskSpec) -> Tensor:
    """The rows that a task's head reads: [S, H] pooled, or where it reads every row all of the text."""
    if not task.reads_rows and task.pooling == "cls":
        return hidden[batch.first_rows[list(sequences)]]
    texts = torch.split(batch.text_rows, list(batch.text_lengths))
    rows = torch.cat([texts[i] for i in sequences])
    if task.reads_rows:
        return hidden[rows]
    lengths = torch.tensor([batch.text_lengths[i] for i in sequences], device=hidden.device)
    return pool(hidden, rows, lengths, task.pooling)
