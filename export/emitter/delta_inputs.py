"""What the graph takes beside the text: the rows of all deltas in stacks, and tables that say whose they are.

Stacks are the pools of ``encoder.bank``: ``[L, P, width]``, one row a rank, bias, unit or vector, the same row numbers
in every layer, row 0 zero. Tables have a row for each delta of a batch (D of them) and hold numbers of stack rows,
filled up with 0; tables of no columns say that no delta of the batch has anything at a place, and nothing is computed
there.

| place | stacks | tables |
|---|---|---|
| a linear, ``query`` | ``query.a`` [L, P, K], ``query.b`` [L, P, N] | ``query.ranks`` [D, R], ``query.bias`` [D, 1] |
| a norm, ``ffn_norm`` | ``ffn_norm.b`` [L, P, H] | ``ffn_norm.bias`` [D, 1] |
| factors of outputs, ``value.scale``, or of a norm's | ``value.scale.g`` [L, P, N], less 1 | ``value.scale.bias`` [D, 1] |
| factors of inputs, ``down.inner`` | ``down.inner.g`` [L, P, K], less 1 | ``down.inner.bias`` [D, 1] |
| an adapter, ``output.adapter`` | ``.down``, ``.up`` [L, P, H], ``.down_bias`` [L, P, 1] | ``.units`` [D, M], ``.bias`` and ``.activation`` [D, 1], a place in ``ADAPTER_ACTIVATIONS`` |
| ``prompt`` | ``prompt.v`` [1, P, E] | ``prompt.rows`` [D, V], ``prompt.form`` [D, 4]: length, lead, shifted, first |
| ``prefix`` | ``prefix.k``, ``prefix.v`` [L, P, H] | ``prefix.rows`` [D, V], ``prefix.form`` [D, 2]: length, shifted |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bertology_serve.encoder.bank import PREFIX, PROMPT, BankEntry, DeltaBank, adapter, inner, scale
from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kinds.slots import DOWN, FFN_NORM, OUTPUT, Anatomy

if TYPE_CHECKING:  # not for who runs a graph that was kept
    from onnx_ir import DataType

    from bertology_serve.export.emitter.nodes import Condition, Nodes, Value

ADAPTER_ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
INDEX = "delta"
"""The input [batch] that names each sequence's delta, by its row in the tables."""
BELOW = "below"
"""The input [T, H] of a graph that begins with a later layer: the rows that the layers before put out."""
GATED = (OUTPUT, DOWN)
"""Slots whose inputs have factors in the graph. What the others read, others read too."""
LENGTH, LEAD, SHIFTED, FIRST = range(4)
"""Columns of ``prompt.form``: vectors, rows of text before them, whether they shift positions, the row a head reads."""
PREFIX_SHIFTED = 1
"""The second column of ``prefix.form``; the first is the length."""


@dataclass(frozen=True)
class Stack:
    """One place: ``columns`` are its stacks' names and widths, ``tables`` its tables' names, each int64.

    ``fixed`` are the widths of tables that are always as wide. Where layers differ, as in a pruned encoder, columns are
    as wide as the widest, and ``layers`` holds the width of each.
    """

    name: str
    depth: int
    columns: dict[str, int]
    tables: tuple[str, ...]
    fixed: dict[str, int] = field(default_factory=dict)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def width(self, column: str, layer: int) -> int:
        """Of a stack in one layer."""
        return self.layers[column][layer] if column in self.layers else self.columns[column]

    def input(self, column: str) -> str:
        """The name that a stack or table has as an input."""
        return f"{self.name}.{column}"


def stacks(anatomy: Anatomy) -> dict[str, Stack]:
    """Every place of an encoder that deltas can change, by its pool's name."""
    return {stack.name: stack for stack in _stacks(anatomy)}


def adapter_places(anatomy: Anatomy) -> tuple[str, ...]:
    """The slots that bottleneck adapters stand behind: Houlsby's two, and Pfeiffer's where norms come last."""
    return (OUTPUT, DOWN) if anatomy.pre_norm else (OUTPUT, DOWN, FFN_NORM)


def _stacks(anatomy: Anatomy) -> Iterator[Stack]:
    hidden, depth = anatomy.hidden, anatomy.layers
    for slot in anatomy.slots.values():
        if slot.inputs:
            columns = {"a": slot.inputs, "b": slot.outputs}
            layers = {
                "a": tuple(slot.inputs_of(layer) for layer in range(slot.depth)),
                "b": tuple(slot.outputs_of(layer) for layer in range(slot.depth)),
            }
            yield Stack(slot.name, slot.depth, columns, ("ranks", "bias"), layers=layers)
            if slot.name in GATED:
                yield Stack(inner(slot.name), slot.depth, {"g": slot.inputs}, ("bias",), layers={"g": layers["a"]})
            yield Stack(scale(slot.name), slot.depth, {"g": slot.outputs}, ("bias",), layers={"g": layers["b"]})
        else:
            yield Stack(slot.name, slot.depth, {"b": slot.outputs}, ("bias",))
            yield Stack(scale(slot.name), slot.depth, {"g": slot.outputs}, ("bias",))
    for place in adapter_places(anatomy):
        columns = {"down": hidden, "down_bias": 1, "up": hidden}
        yield Stack(adapter(place), depth, columns, ("units", "bias", "activation"))
    yield Stack(PROMPT, 1, {"v": anatomy.embedding_width}, ("rows", "form"), {"form": 4})
    kept = tuple(anatomy.heads_of(layer) * anatomy.head_width for layer in range(depth))
    widest = {"k": max(kept), "v": max(kept)}
    yield Stack(PREFIX, depth, widest, ("rows", "form"), {"form": 2}, {"k": kept, "v": kept})


class Tables:
    """The inputs, by the names that ``stacks`` gives them.

    Which tables have columns is for each batch to say, or ``known``: then there are no other places.
    """

    def __init__(self, nodes: Nodes, anatomy: Anatomy, known: Collection[str] | None = None) -> None:
        from onnx_ir import DataType

        self.nodes, self.known, every = nodes, known, stacks(anatomy)
        self.places = {
            name: place
            for name, place in every.items()
            if known is None or any(place.input(table) in known for table in place.tables)
        }
        self.inputs: dict[str, Value] = {}
        self._flat: dict[str, Value] = {}
        self._heights: dict[str, Value] = {}
        for place in self.places.values():
            for column, width in place.columns.items():
                stack = self._add(place.input(column), (place.depth, f"{place.name}.height", width), DataType.FLOAT)
                self._flat[place.input(column)] = stack.reshape(-1, width)
                self._heights.setdefault(place.name, stack.size(1))
            for table in place.tables:
                if known is not None and place.input(table) not in known:
                    continue
                columns = place.fixed.get(table, f"{place.input(table)}.width")
                self._add(place.input(table), ("deltas", columns), DataType.INT64)

    def _add(self, name: str, shape: tuple[str | int, ...], kind: DataType) -> Value:
        self.inputs[name] = self.nodes.input(name, shape, kind)
        return self.inputs[name]

    def table(self, place: str, table: str) -> Value:
        """[D, n], int64."""
        return self.inputs[self.places[place].input(table)]

    def used(self, place: str, table: str) -> Condition:
        """Whether a table has columns: then a delta of the batch has something there."""
        if self.known is not None:
            return self.places[place].input(table) in self.known
        return self.nodes("Greater", self.table(place, table).size(1).squeeze(0), 0)

    def rows(self, place: str, column: str, layer: int, numbers: Value) -> Value:
        """Rows of one layer's stack: numbers [...] -> [..., width]."""
        found, width = self.places[place], self.width(place, column, layer)
        if layer:
            numbers = numbers + self._heights[place] * layer
        rows = self._flat[found.input(column)].gather(numbers)
        return rows if width == found.columns[column] else self.nodes("Slice", rows, [0], [width], [-1])

    def width(self, place: str, column: str, layer: int) -> int:
        """Of a stack in one layer."""
        return self.places[place].width(column, layer)


Arrays = dict[str, NDArray[np.generic]]
_BLANK = RowSegment(0, 0, 0, 0)
LISTS = ("ranks", "units", "rows")
"""Tables with as many columns as the delta that has most; the others have the same for all deltas."""


class Feed:
    """Makes inputs for the graph of an anatomy."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.places = stacks(anatomy)
        self._blank: dict[int, Arrays] = {}
        self._stacks = {
            place.input(column): (place.name, column, np.zeros((place.depth, 1, width), np.float32))
            for place in self.places.values()
            for column, width in place.columns.items()
        }

    def stacks(self, bank: DeltaBank, names: Iterable[str] | None = None) -> Arrays:
        """The bank's pools, float32 and on the CPU, as they lie in memory; one row of zeros where it has none.

        Pools that the graph has no place for are left out; with ``names`` all but those inputs.
        """
        found: Arrays = {}
        for name in self._stacks.keys() if names is None else self._stacks.keys() & names:
            place, column, empty = self._stacks[name]
            pool = bank.pools.get(place)
            found[name] = empty if pool is None else pool.columns[column].numpy()
        return found

    def kind(self, entries: Collection[BankEntry]) -> frozenset[str]:
        """The tables that have columns in a batch of these deltas: what a graph for such batches must know."""
        places = {name for entry in entries for name in entry.rows}
        return frozenset(
            self.places[name].input(table)
            for name in places
            for table in self.places[name].tables
            if table not in LISTS or any(_listed(entry.rows.get(name)) for entry in entries)
        )

    def takes(self, entries: Iterable[BankEntry]) -> bool:
        """Whether the graph has a place for all that these deltas change."""
        return all(entry.rows.keys() <= self.places.keys() for entry in entries)

    def tables(self, entries: Sequence[BankEntry]) -> Arrays:
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


def _listed(segment: RowSegment | None) -> int:
    """How many rows of a stack a delta has at a place, its bias not counted."""
    return segment.last - segment.first if segment else 0


def _table(
    place: Stack, table: str, rows: Sequence[RowSegment | None], deltas: Sequence[BankEntry]
) -> NDArray[np.int64]:
    """[D, n]: one of the tables of a place where a delta is."""
    if table == "form":
        return np.array([(_prompt if place.name == PROMPT else _prefix)(delta) for delta in deltas], np.int64)
    segments = [row or _BLANK for row in rows]
    if table == "bias":
        return np.array([[max(one.bias, 0)] for one in segments], np.int64)
    if table == "activation":
        return np.array(
            [[ADAPTER_ACTIVATIONS.index(one.activation or ADAPTER_ACTIVATIONS[0])] for one in segments], np.int64
        )
    width = max(map(_listed, segments))
    numbers = np.zeros((len(rows), width), np.int64)
    for number, one in enumerate(segments):
        numbers[number, : one.last - one.first] = np.arange(one.first, one.last)
    return numbers


def _prompt(entry: BankEntry) -> tuple[int, int, int, int]:
    """Length, lead, shifted, first."""
    prompt, length = entry.prompt, entry.prompt_length
    if prompt is None:
        return 0, 0, 0, 0
    before = prompt.placement == "before_cls"
    first = length if before and prompt.head_reads == "cls" else 0
    return length, 0 if before else 1, int(prompt.positions == "shifted"), first


def _prefix(entry: BankEntry) -> tuple[int, int]:
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
