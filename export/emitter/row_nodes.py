"""The rows of a batch inside the graph, tokens and prompt vectors; for many deltas, which delta each row is for.

Letters: B sequences of L columns as the caller padded them; R columns inside the graph, prompt included. ``Padded``
computes all B R rows. ``Packed`` computes only those that are no padding: linears, norms and activations then see
T rows, and the attention alone brings them into the grid [B, R] and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from bertology_serve.export.emitter.delta_inputs import FIRST, LEAD, LENGTH, PREFIX_SHIFTED, SHIFTED, Tables
from bertology_serve.export.emitter.nodes import Nodes, Value, counted, joined
from bertology_serve.export.prompt_rows import PromptLayout


@dataclass(frozen=True)
class Text:
    """The caller's batch with all padding at the end: ids and types [B, L]; ``count`` [B, 1], at least 1.

    ``seen`` [B, L] is true where the caller has tokens, ``home`` [B, L] where each of them stands now.
    """

    ids: Value
    types: Value | None
    count: Value
    seen: Value
    home: Value


def gather(ids: Value, mask: Value, types: Value | None) -> Text:
    """Moves padding to the end, wherever it was: left and right padding give the same answer in every family.

    A row of padding alone counts as one token, so that there is no sequence without rows.
    """
    nodes = ids.nodes
    seen = ~nodes("Equal", mask, 0)
    tokens = seen.integer()
    passed, count = nodes("CumSum", tokens, 1), tokens.reduce("Sum", 1, keep=True)
    home = seen.where(passed - 1, count + counted(nodes, ids.size(1)) - passed)
    ids = nodes("ScatterElements", ids, home, ids, axis=1)
    types = None if types is None else nodes("ScatterElements", types, home, types, axis=1)
    return Text(ids, types, nodes("Max", count, 1), seen, home)


class Rows(ABC):
    """Rows [T, ...] of a batch. ``prompt`` is the longest prompt that may stand in it.

    ``ids``, ``positions`` and ``types`` (``None`` without) [T]; ``virtual`` [T] says which rows are the prompt's and
    ``which`` [T] of its vectors they are (``None`` without a prompt); ``seen`` [B, R] what may be attended to,
    ``spoken`` [B, R] the text of it; ``place`` [B, R] the number of the row at each place of the grid.
    """

    def __init__(self, text: Text, weave: PromptLayout) -> None:
        self.text, self.weave, self.nodes, self.prompt = text, weave, text.ids.nodes, weave.length
        self.batch = text.ids.size(0)
        self.columns = self._length() + weave.length if weave.length else self._length()
        column = counted(self.nodes, self.columns)
        told, virtual = column, None  # the column of the text that stands at each column of the grid
        if weave.length:
            virtual = ~(column < weave.lead) & (column < weave.lead + weave.length)
            told = (column < weave.lead).where(column, virtual.where(0, column - weave.length))
        self.spoken = self.seen = told < text.count
        if virtual is not None:
            self.seen, self.spoken = self.seen | virtual, self.spoken & ~virtual
        self.place = self._numbered()
        self.ids = self.pick(text.ids.gather(told, 1))
        self.types = None if text.types is None else self.pick(_untyped(text.types.gather(told, 1), virtual))
        self.positions = self.by_column((column if weave.shifts else told) + weave.offset)
        self.virtual = None if virtual is None else self.by_column(virtual)
        self.which = None if virtual is None else self.by_column((column - weave.lead).clip(0, weave.length - 1))

    @abstractmethod
    def grid(self, rows: Value, heads: int, width: int) -> Value:
        """[T, heads · width] -> [B, heads, R, width]."""

    @abstractmethod
    def flat(self, grid: Value, heads: int, width: int) -> Value:
        """The way back: [B, heads, R, width] -> [T, heads · width]."""

    @abstractmethod
    def pick(self, grid: Value) -> Value:
        """[B, R] -> [T]."""

    @abstractmethod
    def by_column(self, values: Value) -> Value:
        """[R] -> [T]."""

    @abstractmethod
    def _length(self) -> Value:
        """[1]: columns of text in the grid."""

    @abstractmethod
    def _numbered(self) -> Value:
        """``place``."""

    def first(self, rows: Value) -> Value:
        """The row that a [CLS] head reads: [T, H] -> [B, H]."""
        return rows.gather(self.place.gather(self.weave.first, 1))

    def callers(self, rows: Value) -> Value:
        """Every row back where the caller has it, zero at padding: [T, C] -> [B, L, C]."""
        home, weave = self.text.seen.where(self.text.home, 0), self.weave
        if weave.length:
            home = home + (home < weave.lead).where(0, weave.length)
        found = rows.gather(self.nodes("GatherElements", self.place, home, axis=1))
        return self.text.seen.unsqueeze(2).where(found, 0.0)


class Padded(Rows):
    """T = B R."""

    def grid(self, rows: Value, heads: int, width: int) -> Value:
        return rows.reshape(self.batch, self.columns, heads, width).transpose(0, 2, 1, 3)

    def flat(self, grid: Value, heads: int, width: int) -> Value:
        return grid.transpose(0, 2, 1, 3).reshape(-1, heads * width)

    def pick(self, grid: Value) -> Value:
        return grid.reshape(-1)

    def by_column(self, values: Value) -> Value:
        shape = self.nodes("Concat", self.batch, self.columns, axis=0)
        return self.nodes("Expand", values, shape).reshape(-1)

    def _length(self) -> Value:
        return self.text.ids.size(1)

    def _numbered(self) -> Value:
        return counted(self.nodes, self.batch * self.columns).reshape(self.batch, self.columns)


class Packed(Rows):
    """T is the number of rows that are no padding; the grid is as wide as the longest sequence.

    A place of padding in the grid holds a copy of the row before it: it is masked where it would be attended to, and
    what it attends to itself is dropped. One gather both moves rows and brings heads together: nothing is transposed.
    """

    def grid(self, rows: Value, heads: int, width: int) -> Value:
        head = self.nodes.constant(np.arange(heads)[:, None])
        return rows.reshape(-1, width).gather(self.place.unsqueeze(1) * heads + head)

    def flat(self, grid: Value, heads: int, width: int) -> Value:
        sequence, column = self.nodes("Div", self._kept, self.columns), self._kept % self.columns
        head = self.nodes.constant(np.arange(heads))
        place = ((sequence * heads).unsqueeze(1) + head) * self.columns + column.unsqueeze(1)
        return grid.reshape(-1, width).gather(place).reshape(-1, heads * width)

    def pick(self, grid: Value) -> Value:
        return grid.reshape(-1).gather(self._kept)

    def by_column(self, values: Value) -> Value:
        return values.gather(self._kept % self.columns)

    def _length(self) -> Value:
        return self.text.count.reduce("Max", 0)

    def _numbered(self) -> Value:
        return (self.nodes("CumSum", self.seen.reshape(-1).integer(), 0) - 1).reshape(self.batch, self.columns)

    @property
    def _kept(self) -> Value:
        """[T]: the places of the grid, numbered row by row, that are no padding."""
        return self.nodes("NonZero", self.seen.reshape(-1)).squeeze(0)


def _untyped(types: Value, virtual: Value | None) -> Value:
    """Token types with 0 at the prompt's rows."""
    return types if virtual is None else virtual.where(0, types)


LONGEST_PROMPT = 512


class Mixed(Packed):
    """``delta`` [B] names each sequence's delta. The last tile is filled up with copies of the last row.

    ``runs`` are the deltas of the rows; ``which`` [T] the prompt's stack row of each virtual one.
    """

    def __init__(self, text: Text, delta: Value, tables: Tables, offset: int) -> None:
        self.text, self.nodes, self.prompt, self.delta = text, text.ids.nodes, LONGEST_PROMPT, delta
        form = tables.table("prompt", "form").gather(delta)
        length, lead, shifted, self._head = (form.gather([part], 1) for part in (LENGTH, LEAD, SHIFTED, FIRST))
        self._length_of, self._lead = length, lead
        self.batch, self.columns = text.ids.size(0), (text.count + length).reduce("Max", 0).reshape(1)
        column = counted(self.nodes, self.columns).unsqueeze(0)
        virtual = ~(column < lead) & (column < lead + length)
        told = (column < lead).where(column, virtual.where(0, column - length))
        self.spoken = (told < text.count) & ~virtual
        self.seen = self.spoken | virtual
        self.place = self._numbered()
        self._cut(changes(delta))
        self.ids, self.types = self.pick(self._told(text.ids, told)), None
        if text.types is not None:
            self.types = self.pick(virtual.where(0, self._told(text.types, told)))
        moved = self._prefix_shift(tables) + offset
        self.positions = self.pick((self.nodes("Equal", shifted, 1)).where(column, told) + moved)
        self.virtual, self.which = self.pick(virtual), self.pick(self._vectors(tables, column - lead))
        sequence = self.nodes("Div", self._kept, self.columns)
        self.runs = Runs(delta.gather(sequence), self._each)

    def first(self, rows: Value) -> Value:
        return rows.gather(self.nodes("GatherElements", self.place, self._head, axis=1).squeeze(1))

    def callers(self, rows: Value) -> Value:
        home = self.text.seen.where(self.text.home, 0)
        home = home + (home < self._lead).where(0, self._length_of)
        found = rows.gather(self.nodes("GatherElements", self.place, home, axis=1))
        return self.text.seen.unsqueeze(2).where(found, 0.0)

    def _told(self, grid: Value, told: Value) -> Value:
        """[B, L] -> [B, R], the text's column at each column of the grid."""
        most = grid.size(1) - 1
        return self.nodes("GatherElements", grid, self.nodes("Min", told, most), axis=1)

    def _prefix_shift(self, tables: Tables) -> Value:
        """[B, 1]: by how much prefixes move positions."""
        form = tables.table("prefix", "form").gather(self.delta)
        return form.gather([LENGTH], 1) * form.gather([PREFIX_SHIFTED], 1)

    def _vectors(self, tables: Tables, at: Value) -> Value:
        """[B, R]: the stack row of the vector at each place of the prompt."""
        rows = tables.table("prompt", "rows").gather(self.delta)
        rows = self.nodes("Pad", rows, [0, 0, 0, 1], 0)  # a column at least
        return self.nodes("GatherElements", rows, self.nodes("Max", self.nodes("Min", at, rows.size(1) - 1), 0), axis=1)

    def _cut(self, begins: Value) -> None:
        """Decides the tiles, once the rows are numbered."""
        rows = self._found.size(0)
        self._each, tiles = tile(rows, begins.integer().reduce("Sum", 0, keep=True))
        self._rows = self.nodes("Min", counted(self.nodes, self._each * tiles), rows - 1)

    @property
    def _found(self) -> Value:
        return self.nodes("NonZero", self.seen.reshape(-1)).squeeze(0)

    @property
    def _kept(self) -> Value:
        return self._found.gather(self._rows)


SMALLEST, LARGEST = 16, 128
LAST = 2**62


def tile(rows: Value, runs: Value) -> tuple[Value, Value]:
    """How to cut [1] rows in [1] runs: rows a tile, and tiles, [1] each; about one run a tile."""
    nodes = rows.nodes
    most = nodes("Equal", runs, 1).where(rows, nodes("Div", rows, runs).clip(SMALLEST, LARGEST))
    tiles = nodes("Div", rows + (most - 1), most)
    each = nodes("Div", rows + (tiles - 1), tiles)
    return each, nodes("Div", rows + (each - 1), each)


def changes(index: Value) -> Value:
    """index [n] -> true [n] where a run begins."""
    nodes = index.nodes
    before = joined(0, nodes.constant(np.array([-1])), nodes("Slice", index, [0], [-1], [0]))
    return ~nodes("Equal", index, before)


class Runs:
    """Rows [tiles · each] of a batch and the deltas [tiles, S] that each tile touches.

    ``index`` [tiles · each] names the delta of every row. ``owners`` [tiles, S] are those of a tile, and ``mine``
    [tiles, each, S] is true where a row is for that owner, ``mask`` 1.
    """

    def __init__(self, index: Value, each: Value) -> None:
        nodes: Nodes = index.nodes
        begins = changes(index)
        run = (nodes("CumSum", begins.integer(), 0) - 1).reshape(-1, each)
        first = nodes("Slice", run, [0], [1], [1])
        last = nodes("Slice", run, [-1], [LAST], [1])
        touched = first + counted(nodes, (last - first).reduce("Max", 0) + 1)
        starts = nodes("NonZero", begins).squeeze(0)
        known = nodes("Min", touched, starts.size(0) - 1)
        self.nodes, self.index, self.each = nodes, index, each
        self.owners = index.gather(starts).gather(known)
        self.mine = nodes("Equal", run.unsqueeze(2), touched.unsqueeze(1))
        self.mask = self.mine.real()

    def of(self, table: Value) -> Value:
        """table [D, R] -> [tiles, S · R], the entries of the deltas of each tile."""
        return self.nodes("Reshape", table.gather(self.owners), [0, -1])

    def owned(self, table: Value) -> tuple[Value, Value]:
        """What rows have of products [tiles, each, S · R] with the entries of ``table`` [D, R], whose last is a bias.

        Two of that shape: true where a product is for the row's own delta and no bias, and 1 where it is its bias.
        """
        last = table.size(1) - 1
        bias, mine = self.nodes("Equal", counted(self.nodes, table.size(1)), last), self.mine.unsqueeze(3)
        ranks, biases = (self.nodes("Reshape", mine & chosen, [0, 0, -1]) for chosen in (~bias, bias))
        return ranks, biases.real()

    def tiled(self, rows: Value, width: int) -> Value:
        """[tiles · each, width] -> [tiles, each, width]."""
        return rows.reshape(-1, self.each, width)
