"""The graph's inputs for one batch, from the bank of resident deltas: nothing of the stacks is copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.bank import PROMPT, DeltaBank, Entry
from bertology_serve.encoder.packing import PackedBatch
from bertology_serve.export.multi.stacks import ACTIVATIONS, INDEX, Stack, stacks
from bertology_serve.kernels.segments import RowSegment

Arrays = dict[str, NDArray[Any]]
_BLANK = RowSegment(0, 0, 0, 0)


class Feed:
    """Makes inputs for the graph of an anatomy."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.places = stacks(anatomy)
        self._blank: dict[int, Arrays] = {}
        self._empty = {
            place.input(column): np.zeros((place.depth, 1, width), np.float32)
            for place in self.places.values()
            for column, width in place.columns.items()
        }

    def stacks(self, bank: DeltaBank) -> Arrays:
        """The bank's pools, float32 and on the CPU, as they lie in memory; one row of zeros where it has none.

        Pools that the graph has no place for are left out.
        """
        found: Arrays = {}
        for name, pool in list(bank.pools.items()):
            if name not in self.places:
                continue
            for column, tensor in pool.columns.items():
                found[self.places[name].input(column)] = tensor.numpy()
        return self._empty | found

    def takes(self, entries: Iterable[Entry]) -> bool:
        """Whether the graph has a place for all that these deltas change."""
        return all(entry.rows.keys() <= self.places.keys() for entry in entries)

    def tables(self, entries: Sequence[Entry]) -> Arrays:
        """``delta`` [S] and the tables, a row for each delta among the sequences' entries, in order of appearance."""
        deltas = {entry.key: entry for entry in entries}
        numbers = {key: number for number, key in enumerate(deltas)}
        found: Arrays = {INDEX: np.array([numbers[entry.key] for entry in entries], np.int64)} | self._none(len(deltas))
        for name in {name for entry in deltas.values() for name in entry.rows}:
            place = self.places[name]
            rows = [entry.rows.get(name) for entry in deltas.values()]
            for table in place.tables:
                found[place.input(table)] = _table(place, table, rows, list(deltas.values()))
        return found

    def _none(self, deltas: int) -> Arrays:
        """The tables of that many deltas which change nothing."""
        if deltas not in self._blank:
            self._blank[deltas] = {
                place.input(table): np.zeros((deltas, place.fixed.get(table, 0)), np.int64)
                for place in self.places.values()
                for table in place.tables
            }
        return self._blank[deltas]


def _table(place: Stack, table: str, rows: Sequence[RowSegment | None], deltas: Sequence[Entry]) -> NDArray[np.int64]:
    """[D, n]: one of the tables of a place where a delta is."""
    if table == "form":
        return np.array([(_prompt if place.name == PROMPT else _prefix)(delta) for delta in deltas], np.int64)
    segments = [row or _BLANK for row in rows]
    if table == "bias":
        return np.array([[max(one.bias, 0)] for one in segments], np.int64)
    if table == "activation":
        return np.array([[ACTIVATIONS.index(one.activation or ACTIVATIONS[0])] for one in segments], np.int64)
    width = max(one.last - one.first for one in segments)
    numbers = np.zeros((len(rows), width), np.int64)
    for number, one in enumerate(segments):
        numbers[number, : one.last - one.first] = np.arange(one.first, one.last)
    return numbers


def _prompt(entry: Entry) -> tuple[int, int, int, int]:
    """Length, lead, shifted, first."""
    prompt, length = entry.prompt, entry.prompt_length
    if prompt is None:
        return 0, 0, 0, 0
    before = prompt.placement == "before_cls"
    first = length if before and prompt.head_reads == "cls" else 0
    return length, 0 if before else 1, int(prompt.positions == "shifted"), first


def _prefix(entry: Entry) -> tuple[int, int]:
    """Length, shifted."""
    return entry.prefix_length, int(entry.prefix is not None and entry.prefix.positions == "shifted")


def texts(batch: PackedBatch, chosen: Sequence[int], names: Sequence[str]) -> Arrays:
    """The text of chosen sequences of a batch as ``input_ids``, ``attention_mask`` and ``token_type_ids``.

    int64 [S, L], padded on the right.
    """
    lengths, ends = np.array(batch.text_lengths), np.cumsum(batch.text_lengths)
    own = lengths[list(chosen)]
    row, column = np.repeat(np.arange(len(own)), own), np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
    at = batch.text_rows.numpy()[np.repeat((ends - lengths)[list(chosen)], own) + column]
    table = np.zeros((3, len(own), int(own.max())), np.int64)
    table[0, row, column], table[1, row, column], table[2, row, column] = (
        batch.ids.numpy()[at],
        1,
        batch.types.numpy()[at],
    )
    return dict(zip(names, table, strict=False))
