"""One text, several deltas: its rows are computed once, up to the lowest layer that a delta changes.

Sequences of the same tokens are one until the lowest layer of a delta among them; there its rows fork. Deltas that
change no layer (probes, heads, the bare base) need no rows of their own at all. ``share`` makes the batch,
``SharedRows`` counts what it spares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from bertology_serve.encoder.bank import BARE, BankEntry
from bertology_serve.encoder.batch import Fork, PackedBatch
from bertology_serve.tasks.spec import Encoding

if TYPE_CHECKING:
    from bertology_serve.encoder.delta_set import Job

Text = tuple[tuple[int, ...], tuple[int, ...]]
Pack = Callable[[Sequence[Encoding], Sequence[BankEntry]], PackedBatch]


def text_of(encoding: Encoding) -> Text:
    """What makes two sequences the same: their ids and types."""
    return encoding.ids, encoding.types


@dataclass(frozen=True)
class LayerSpan:
    """The batch that runs from ``layer`` on; ``seats[i]`` is the packed sequence in it that is the caller's i-th."""

    layer: int
    batch: PackedBatch
    seats: Sequence[int]


def share(
    encodings: Sequence[Encoding], entries: Sequence[BankEntry], depth: int, pack: Pack
) -> tuple[PackedBatch, Sequence[int]]:
    """The batch of all sequences, and for each the sequence of ``batch.last`` that answers for it.

    ``depth`` is the number of layers, before each of which sequences may fork.
    """
    texts = [text_of(encoding) for encoding in encodings]
    groups: dict[Text, dict[str, int]] = {}
    for text, entry in zip(texts, entries, strict=True):
        groups.setdefault(text, {})[_key(entry, depth)] = entry.lowest
    if len(groups) == len(texts):
        batch = pack(encodings, entries)
        return batch, _seats(batch, range(len(texts)))
    stages: list[LayerSpan] = []
    for layer in sorted({0, *_forks(groups, depth)}):
        places: dict[tuple[Text, str], int] = {}
        chosen: list[tuple[Encoding, BankEntry]] = []
        own = []
        for text, encoding, entry in zip(texts, encodings, entries, strict=True):
            together = sum([lowest > layer for lowest in groups[text].values()]) > 1
            entry = BARE if entry.lowest >= depth or (entry.lowest > layer and together) else entry
            place = places.setdefault((text, entry.key), len(chosen))
            if place == len(chosen):
                chosen.append((encoding, entry))
            own.append(place)
        batch = pack(*zip(*chosen, strict=True))
        stages.append(LayerSpan(layer, batch, _seats(batch, own)))
    forks = [Fork(now.layer, now.batch, _copies(before, now)) for before, now in pairwise(stages)]
    return replace(stages[0].batch, forks=tuple(forks)), stages[-1].seats


class SharedRows:
    """The texts of a batch as it grows, and how many of their layers' rows what comes next need not compute."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._texts: dict[Text, dict[str, int]] = {}  # the deltas asked about it, and the lowest layer of each

    def spared(self, asked: Job) -> tuple[int, int]:
        """Rows, and their squared lengths' sum, that are computed anyway; a part of the layers is a part of them. One
        row is always left: nothing waits for nothing.
        """
        rows = squares = 0
        if not self._texts:
            return rows, squares
        lowest, key = min(asked.ready.entry.lowest, self._depth), _key(asked.ready.entry, self._depth)
        for encoding in asked.encodings:
            deltas = self._texts.get(text_of(encoding))
            if deltas is None:
                continue
            layers, length = self._depth if key in deltas else min(max(deltas.values()), lowest), len(encoding.ids)
            rows += length * layers // self._depth
            squares += length * length * layers // self._depth
        return min(rows, sum([len(encoding.ids) for encoding in asked.encodings]) - 1) if rows else 0, squares

    def add(self, asked: Job) -> None:
        """From now on it is in the batch."""
        lowest, key = min(asked.ready.entry.lowest, self._depth), _key(asked.ready.entry, self._depth)
        for encoding in asked.encodings:
            self._texts.setdefault(text_of(encoding), {})[key] = lowest


def _key(entry: BankEntry, depth: int) -> str:
    return BARE.key if entry.lowest >= depth else entry.key


def _forks(groups: Mapping[Text, Mapping[str, int]], depth: int) -> Iterator[int]:
    """The layers where a delta leaves others of the same text."""
    for members in groups.values():
        for layer in set(members.values()):
            if 0 < layer < depth and sum([other >= layer for other in members.values()]) > 1:
                yield layer


def _seats(batch: PackedBatch, places: Sequence[int]) -> list[int]:
    """Numbers of sequences as they were given to ``pack``, as numbers of packed ones."""
    packed = np.argsort(batch.order)
    return [int(packed[place]) for place in places]


def _copies(before: LayerSpan, now: LayerSpan) -> torch.Tensor:
    """For each row of a stage's batch the row of the batch before that it begins as."""
    source = dict(zip(now.seats, before.seats, strict=True))
    starts = before.batch.starts
    rows = [np.arange(starts[source[i]], starts[source[i]] + now.batch.lengths[i]) for i in range(now.batch.sequences)]
    return torch.from_numpy(np.concatenate(rows)).to(now.batch.ids.device)
