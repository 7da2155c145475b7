"""Packs tokenised sequences of many deltas into one batch of unpadded rows, and plans which pool rows act on which.

Sequences of one delta lie next to each other, the shorter ones first. Where an encoder cannot be packed, the same
structure holds padded rows: sequence i then owns rows ``i * stride`` to ``(i + 1) * stride``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from bertology_serve.encoder.bank import PROMPT, BankEntry
from bertology_serve.errors import LimitError
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import Head, pool
from bertology_serve.tasks.spec import Encoding, TaskSpec


@dataclass(frozen=True)
class PackedBatch:
    """T rows of S sequences; row tensors are int64.

    ``ids``, ``types``, ``positions`` [T]; ``starts`` and ``lengths`` [S] of each sequence's rows, prompts included,
    padding not; ``stride`` is 0 for packed batches, else Lmax. ``text_rows`` are the rows of text in order,
    ``text_lengths`` [S] how many each sequence has, ``first_rows`` [S] the row that a [CLS] head reads.
    ``prompt_rows`` are rows that take the vectors ``prompt_vectors`` of the prompt pool. ``entries`` [S] is each
    sequence's place in the bank; ``order[i]`` the caller's index of packed sequence i.
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

    @property
    def rows(self) -> int:
        """T: rows in the batch, padding included."""
        return self.ids.shape[0]

    @property
    def sequences(self) -> int:
        """S: sequences in the batch."""
        return len(self.lengths)


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
    rank = {key: i for i, key in enumerate(dict.fromkeys(entry.key for entry in entries))}
    lengths = [rows_of(encoding, entry) for encoding, entry in zip(encodings, entries, strict=True)]
    order = sorted(range(len(encodings)), key=lambda i: (rank[entries[i].key], lengths[i]))
    stride = max(lengths) if padded else 0
    total = stride * len(order) if padded else sum(lengths)
    table = np.zeros((3, total), dtype=np.int64)  # ids, types, positions
    starts, firsts, text, prompt_rows, prompt_vectors = [], [], [], [], []
    at = 0
    for i in order:
        encoding, entry = encodings[i], entries[i]
        layout = _rows(len(encoding), entry, anatomy)
        table[0, at + layout.text] = encoding.ids
        table[1, at + layout.text] = encoding.types
        table[2, at : at + lengths[i]] = layout.positions
        starts.append(at)
        firsts.append(at + layout.first)
        text.append(at + layout.text)
        if entry.prompt_length:
            prompt_rows.append(at + layout.prompt)
            prompt_vectors.append(np.arange(entry.rows[PROMPT].first, entry.rows[PROMPT].last))
        at += stride or lengths[i]
    index = torch.from_numpy(table).to(device)
    return PackedBatch(
        ids=index[0],
        types=index[1],
        positions=index[2],
        starts=tuple(starts),
        lengths=tuple(lengths[i] for i in order),
        stride=stride,
        text_rows=_index(text, device),
        text_lengths=tuple(len(encodings[i]) for i in order),
        first_rows=torch.tensor(firsts, dtype=torch.int64, device=device),
        prompt_rows=_index(prompt_rows, device),
        prompt_vectors=_index(prompt_vectors, device),
        entries=tuple(entries[i] for i in order),
        order=tuple(order),
    )


@dataclass(frozen=True)
class _Rows:
    """Row numbers inside one sequence: text, prompt, the row a [CLS] head reads; and the position of every row."""

    text: np.ndarray
    prompt: np.ndarray
    first: int
    positions: np.ndarray


def _rows(tokens: int, entry: BankEntry, anatomy: Anatomy) -> _Rows:
    virtual = entry.prompt_length
    shift = entry.prefix_length if entry.prefix is not None and entry.prefix.positions == "shifted" else 0
    offset = anatomy.position_offset + shift
    text = np.arange(tokens)
    prompt, first, positions = text[:0], 0, text + offset
    if entry.prompt is not None:
        before = entry.prompt.placement == "before_cls"
        prompt = np.arange(virtual) + (0 if before else 1)
        text = text + virtual
        if not before:
            text[0] = 0
        first = 0 if entry.prompt.head_reads == "first_row" else int(text[0])
        if entry.prompt.positions == "shifted":
            positions = np.arange(tokens + virtual) + offset
        else:
            kept = np.full(tokens + virtual, offset)
            kept[text] = np.arange(tokens) + offset
            positions = kept
    if positions[-1] - anatomy.position_offset >= anatomy.max_tokens:
        raise LimitError(
            f"a sequence of {tokens} tokens with {virtual + shift} virtual ones does not fit the encoder's "
            f"{anatomy.max_tokens} positions; lower max_length"
        )
    return _Rows(text, prompt, first, positions)


def _index(parts: list[np.ndarray], device: torch.device) -> Tensor:
    whole = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(whole.astype(np.int64, copy=False)).to(device)


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
    [S, H]; in the head's own precision, float32 unless it was moved.
    """
    rows = read_rows(hidden, batch, sequences, task)
    own = next((parameter.dtype for parameter in head.parameters()), torch.float32)
    return head(rows.to(own))  # type: ignore[no-any-return]


def read_rows(hidden: Tensor, batch: PackedBatch, sequences: Sequence[int], task: TaskSpec) -> Tensor:
    """The rows that a task's head reads: [S, H] pooled, or for tasks that answer for every token all of the text."""
    if not task.per_token and task.pooling == "cls":
        return hidden[batch.first_rows[list(sequences)]]
    texts = torch.split(batch.text_rows, list(batch.text_lengths))
    rows = torch.cat([texts[i] for i in sequences])
    if task.per_token:
        return hidden[rows]
    lengths = torch.tensor([batch.text_lengths[i] for i in sequences], device=hidden.device)
    return pool(hidden, rows, lengths, task.pooling)
