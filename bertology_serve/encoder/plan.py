"""The plan of a batch: which pool rows are active for which rows of the batch. The same for every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bertology_serve.encoder.bank import Entry
from bertology_serve.encoder.packing import PackedBatch
from bertology_serve.kernels.segments import RowSegment


@dataclass(frozen=True)
class Run:
    """Consecutive sequences ``first`` to ``last`` of one delta, which own the rows ``lo`` to ``hi``."""

    entry: Entry
    first: int
    last: int
    lo: int
    hi: int


@dataclass(frozen=True)
class BatchPlan:
    """``runs``: the deltas of the batch in order. ``segments``: for each pool, its active row segments.

    ``partial`` are the pools that some delta does not use in every layer.
    """

    runs: tuple[Run, ...]
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


def _uses(entry: Entry, pool: str, layer: int) -> bool:
    return pool not in entry.layers or layer in entry.layers[pool]


def make_plan(batch: PackedBatch) -> BatchPlan:
    """The plan of a packed or padded batch."""
    runs = tuple(_runs(batch))
    segments: dict[str, list[RowSegment]] = {}
    for run in runs:
        for pool, template in run.entry.rows.items():
            segments.setdefault(pool, []).append(replace(template, lo=run.lo, hi=run.hi))
    return BatchPlan(runs, segments, frozenset(pool for run in runs for pool in run.entry.layers))


def _runs(batch: PackedBatch) -> Iterator[Run]:
    first = 0
    for i in range(1, batch.sequences + 1):
        if i == batch.sequences or batch.entries[i].key != batch.entries[first].key:
            hi = batch.starts[i] if i < batch.sequences else batch.rows
            yield Run(batch.entries[first], first, i, batch.starts[first], hi)
            first = i
