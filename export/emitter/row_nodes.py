"""The rows of a batch inside the graph, tokens and prompt vectors; for many deltas, which delta each row is for.

Letters: B sequences of L columns as the caller padded them; R columns inside the graph, prompt included. ``Padded``
computes all B R rows. ``Packed`` computes only those that are no padding: linears, norms and activations then see
T rows, and the attention alone brings them into the grid [B, R] and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import onnx_ir as ir

from bertology_serve.encoder.bank import PREFIX, PROMPT
from bertology_serve.export.emitter.delta_inputs import FIRST, LEAD, LENGTH, PREFIX_SHIFTED, SHIFTED, Tables
from bertology_serve.export.emitter.nodes import Condition, Nodes, Value, counted, joined
from bertology_serve.kinds.effects import PromptEffect


@dataclass(frozen=True)
class TextBatch:
    """The caller's batch with all padding at the end: ids and types [B, L]; ``count`` [B, 1], at least 1.

    ``seen`` [B, L] is true where the caller has tokens, ``home`` [B, L] where each of them stands now.
    """

    ids: Value
    types: Value | None
    count: Value
    seen: Value
    home: Value


def gather(ids: Value, mask: Value, types: Value | None) -> TextBatch:
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
    return TextBatch(ids, types, nodes("Max", count, 1), seen, home)


@dataclass(frozen=True)
class LengthGroup:
    """B sequences that attend side by side, in a grid with R columns, as many as the longest has rows.

    ``seen`` [B, R] is true where a sequence has a row; ``which`` [B] numbers them, ``None``: they are all there are.
    """

    seen: Value
    which: Value | None = None

    @property
    def batch(self) -> Value:
        """B, [1]."""
        return self.seen.size(0)

    @property
    def columns(self) -> Value:
        """R, [1]."""
        return self.seen.size(1)

    def of(self, values: Value) -> Value:
        """Those of its sequences, of values [all, ...]."""
        return values if self.which is None else values.gather(self.which)


Number = TypeVar("Number", int, Value)


@dataclass(frozen=True)
class PromptLayout(Generic[Number]):
    """Where the ``length`` rows of a soft prompt stand: behind ``lead`` rows of text.

    ``shifted``: rows are numbered as they stand, else the text keeps its positions and the prompt has that of [CLS].
    ``first`` is the row that a [CLS] head reads, ``offset`` the position of the first row. All are numbers, or, where
    each sequence has a delta of its own, values [B, 1]. No prompt is longer than ``most``; ``vectors`` turns places
    within the prompt [B, R] into numbers of vectors.
    """

    length: Number
    lead: Number
    shifted: Condition
    first: Number
    offset: int | Value
    most: int
    vectors: Callable[[Value], Value]

    @property
    def end(self) -> Number:
        """The column of the grid behind the prompt."""
        return self.lead + self.length

    @staticmethod
    def of(prompt: PromptEffect | None, offset: int) -> PromptLayout[int]:
        """That of one delta."""
        if prompt is None:
            return PromptLayout(0, 0, False, 0, offset, 0, lambda at: at)
        length, lead = int(prompt.vectors.shape[0]), int(prompt.placement == "after_cls")
        first = 0 if lead or prompt.head_reads == "first_row" else length
        return PromptLayout(
            length, lead, prompt.positions == "shifted", first, offset, length, lambda at: at.clip(0, length - 1)
        )

    @staticmethod
    def of_each(tables: Tables, delta: Value, offset: int) -> PromptLayout[Value] | PromptLayout[int]:
        """Those of the deltas [B] of a batch's sequences."""
        nodes = delta.nodes
        moved: int | Value = offset
        if PREFIX in tables.places:
            prefix = tables.table(PREFIX, "form").gather(delta)
            moved = prefix.gather([LENGTH], 1) * prefix.gather([PREFIX_SHIFTED], 1) + offset
        if PROMPT not in tables.places:
            return replace(PromptLayout.of(None, offset), offset=moved)
        form = tables.table(PROMPT, "form").gather(delta)
        length, lead, shifted, first = (form.gather([part], 1) for part in (LENGTH, LEAD, SHIFTED, FIRST))

        def vectors(at: Value) -> Value:
            rows = tables.table(PROMPT, "rows").gather(delta)
            rows = nodes("Pad", rows, [0, 0, 0, 1], 0)  # a column at least
            return nodes("GatherElements", rows, nodes("Max", nodes("Min", at, rows.size(1) - 1), 0), axis=1)

        return PromptLayout(length, lead, nodes("Equal", shifted, 1), first, moved, LONGEST_PROMPT, vectors)


class Rows(ABC):
    """Rows [T, ...] of a batch, a prompt among the text where ``layout`` has it.

    ``ids``, ``positions`` and ``types`` (``None`` without) [T]; ``virtual`` [T] says which rows are the prompt's and
    ``which`` [T] of its vectors they are (``None`` without a prompt); ``seen`` [B, R] what may be attended to,
    ``spoken`` [B, R] the text of it; ``place`` [B, R] the number of the row at each place of the grid.

    ``groups`` are the grids that sequences attend in. All but the first are empty where ``several`` is false.
    """

    def __init__(self, text: TextBatch, layout: PromptLayout[int] | PromptLayout[Value]) -> None:
        self.text, self.layout, self.nodes = text, layout, text.ids.nodes
        self.batch, length, lead = text.ids.size(0), layout.length, layout.lead
        self.columns = self._widest()
        column = counted(self.nodes, self.columns).unsqueeze(0)
        told, virtual = column, None  # the column of the text that stands at each column of the grid
        if layout.most:
            virtual = ~(column < lead) & (column < layout.end)
            told = (column < lead).where(column, virtual.where(0, column - length))
        self.spoken = self.seen = told < text.count
        if virtual is not None:
            self.seen, self.spoken = self.seen | virtual, self.spoken & ~virtual
        self.place = self._numbered()
        self.ids, self.types = self.pick(self._told(text.ids, told)), None
        if text.types is not None:
            types = self._told(text.types, told)
            self.types = self.pick(types if virtual is None else virtual.where(0, types))
        stand = layout.shifted
        at = (column if stand else told) if isinstance(stand, bool) else stand.where(column, told)
        self.positions = self._everywhere(at + layout.offset)
        self.virtual = None if virtual is None else self._everywhere(virtual)
        self.which = None if virtual is None else self._everywhere(layout.vectors(column - lead))
        self.several: Condition = False
        self.groups: tuple[LengthGroup, ...] = (LengthGroup(self.seen),)

    @abstractmethod
    def spread(self, rows: Value, heads: int, width: int) -> Value:
        """[T, heads · width] -> what the groups' ``grids`` are cut from."""

    @abstractmethod
    def grids(self, spread: Value, heads: int, width: int, groups: Sequence[LengthGroup]) -> list[Value]:
        """``spread`` -> [heads, B, R, width] of each group: of the first alone, or of all."""

    @abstractmethod
    def gathered(self, grids: Sequence[Value], heads: int, width: int) -> Value:
        """The way back: [heads, B, R, width] of each group -> what ``rejoined`` takes."""

    @abstractmethod
    def rejoined(self, spread: Value, heads: int, width: int) -> Value:
        """-> [T, heads · width]."""

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
    def _widest(self) -> Value:
        """R, [1]: columns of the grid."""

    @abstractmethod
    def _numbered(self) -> Value:
        """``place``."""

    def first(self, rows: Value) -> Value:
        """The row that a [CLS] head reads: [T, H] -> [B, H]."""
        at = self.layout.first
        if isinstance(at, int):
            return rows.gather(self.place.gather(at, 1))
        return rows.gather(self.nodes("GatherElements", self.place, at, axis=1).squeeze(1))

    def callers(self, rows: Value) -> Value:
        """Every row back where the caller has it, zero at padding: [T, C] -> [B, L, C]."""
        home = self.text.seen.where(self.text.home, 0)
        if self.layout.most:
            home = home + (home < self.layout.lead).where(0, self.layout.length)
        found = rows.gather(self.nodes("GatherElements", self.place, home, axis=1))
        return self.text.seen.unsqueeze(2).where(found, 0.0)

    def _told(self, grid: Value, told: Value) -> Value:
        """[B, L] -> [B, R]: the text's column at each column of the grid, told [1 or B, R]."""
        if isinstance(self.layout.length, int):
            return grid.gather(told.squeeze(0), 1)
        return self.nodes("GatherElements", grid, self.nodes("Min", told, grid.size(1) - 1), axis=1)

    def _everywhere(self, values: Value) -> Value:
        """[1 or B, R] -> [T]."""
        return self.pick(self.nodes("Expand", values, joined(0, self.batch, self.columns)))


class Padded(Rows):
    """T = B R."""

    def spread(self, rows: Value, heads: int, width: int) -> Value:
        return rows.reshape(self.batch, self.columns, heads, width).transpose(2, 0, 1, 3)

    def grids(self, spread: Value, heads: int, width: int, groups: Sequence[LengthGroup]) -> list[Value]:
        return [spread]

    def gathered(self, grids: Sequence[Value], heads: int, width: int) -> Value:
        return grids[0]

    def rejoined(self, spread: Value, heads: int, width: int) -> Value:
        return spread.transpose(1, 2, 0, 3).reshape(-1, heads * width)

    def grid(self, rows: Value, heads: int, width: int) -> Value:
        return rows.reshape(self.batch, self.columns, heads, width).transpose(0, 2, 1, 3)

    def flat(self, grid: Value, heads: int, width: int) -> Value:
        return grid.transpose(0, 2, 1, 3).reshape(-1, heads * width)

    def pick(self, grid: Value) -> Value:
        return grid.reshape(-1)

    def _widest(self) -> Value:
        columns = self.text.ids.size(1)
        return columns + self.layout.length if self.layout.most else columns

    def _numbered(self) -> Value:
        return counted(self.nodes, self.batch * self.columns).reshape(self.batch, self.columns)


class Packed(Rows):
    """T is the number of rows that are no padding; the grid is as wide as the longest sequence.

    A place of padding in the grid holds a copy of its sequence's last row: it is masked where it would be attended to,
    and what it attends to itself is dropped. One gather both moves rows and brings heads together: nothing is
    transposed.

    Sequences attend in groups of like length where that spares enough places of the grid: the first group has those
    longer than half of the longest, the next those longer than a quarter, and so on.
    """

    def __init__(self, text: TextBatch, layout: PromptLayout[int] | PromptLayout[Value]) -> None:
        super().__init__(text, layout)
        nodes, empty = self.nodes, self.nodes.constant(np.zeros((0, 0), bool))
        padding = self.batch * self.columns - self._own_places.size(0)
        self.several = nodes("Greater", padding * self.columns, SPARED).squeeze(0)

        def one() -> list[Value]:
            every = counted(nodes, self.batch)
            nobody = [nodes.constant(np.zeros(0, np.int64)), empty] * (GROUPS - 1)
            return [self.place.reshape(-1), self._own_places, every, self.seen, *nobody]

        def more() -> list[Value]:
            own = self.seen.integer().reduce("Sum", 1)  # rows of each sequence
            doubled = own.unsqueeze(1) * [2**times for times in range(1, GROUPS)]
            halves = (doubled <= self.columns).integer().reduce("Sum", 1)  # the number of each one's group
            mine = nodes("Equal", halves.unsqueeze(1), list(range(GROUPS)))
            widest = mine.where(own.unsqueeze(1), 0).reduce("Max", 0)
            first = nodes("CumSum", own, 0, exclusive=1)
            found, places, seen = [], [], []
            for number in range(GROUPS):
                which = nodes("NonZero", nodes("Equal", halves, number)).squeeze(0)
                rows, column = own.gather(which).unsqueeze(1), counted(nodes, widest.gather([number]))
                seen.append(column < rows)
                places.append((first.gather(which).unsqueeze(1) + nodes("Min", column, rows - 1)).reshape(-1))
                found += [which, seen[-1]]
            place = joined(0, *places)
            used = nodes("NonZero", joined(0, *(one.reshape(-1) for one in seen))).squeeze(0)
            home = nodes("ScatterElements", used, place.gather(used), used, axis=0)
            return [place, home, *found]

        kinds = [ir.DataType.INT64] * 2 + [ir.DataType.INT64, ir.DataType.BOOL] * GROUPS
        place, home, *found = nodes.choose_all(self.several, kinds, more, one)
        self._from, self._home = place, self.filled(home)
        self.groups = tuple(map(LengthGroup, found[1::2], found[::2]))

    def spread(self, rows: Value, heads: int, width: int) -> Value:
        """[heads, N, width]: the places of all groups, one group after the other."""
        head = self.nodes.constant(np.arange(heads)[:, None])
        return rows.reshape(-1, width).gather(self._from * heads + head)

    def grids(self, spread: Value, heads: int, width: int, groups: Sequence[LengthGroup]) -> list[Value]:
        nodes, end, found = self.nodes, self.nodes.value([0]), []
        for group in groups:
            start, end = end, end + group.batch * group.columns
            part = nodes("Slice", spread, start, end, [1]) if len(groups) > 1 else spread
            shape = joined(0, nodes.value([heads]), group.batch, group.columns, nodes.value([width]))
            found.append(nodes("Reshape", part, shape, allowzero=1))
        return found

    def gathered(self, grids: Sequence[Value], heads: int, width: int) -> Value:
        nodes, found = self.nodes, []
        for grid in grids:
            shape = joined(0, nodes.value([heads]), grid.size(1) * grid.size(2), nodes.value([width]))
            found.append(nodes("Reshape", grid, shape, allowzero=1))
        return found[0] if len(found) == 1 else joined(1, *found)

    def rejoined(self, spread: Value, heads: int, width: int) -> Value:
        head = self.nodes.constant(np.arange(heads)) * self._from.size(0)
        return spread.reshape(-1, width).gather(self._home.unsqueeze(1) + head).reshape(-1, heads * width)

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

    def _widest(self) -> Value:
        rows = self.text.count + self.layout.length if self.layout.most else self.text.count
        return rows.reduce("Max", 0).reshape(1)

    def _numbered(self) -> Value:
        return (self.nodes("CumSum", self.seen.reshape(-1).integer(), 0) - 1).reshape(self.batch, self.columns)

    @property
    def _kept(self) -> Value:
        """[T]: the places of the grid, numbered row by row, that are no padding."""
        return self.filled(self._own_places)

    @property
    def _own_places(self) -> Value:
        return self.nodes("NonZero", self.seen.reshape(-1)).squeeze(0)

    def filled(self, rows: Value) -> Value:
        """[rows of all sequences, ...] -> [T, ...]."""
        return rows


LONGEST_PROMPT = 512
GROUPS = 4
SPARED = 16384
"""Places of the one grid that must be padding's for sequences to attend in groups: what more nodes cost."""


class MixedRows(Packed):
    """``delta`` [B] names each sequence's delta; ``runs`` are the deltas of the rows, cut into tiles of like deltas.

    The last tile is filled up with copies of the last row.
    """

    def __init__(self, text: TextBatch, layout: PromptLayout[int] | PromptLayout[Value], delta: Value) -> None:
        self.delta = delta
        super().__init__(text, layout)
        self.runs = Runs(delta.gather(self.nodes("Div", self._kept, self.columns)), self._tiles[0])

    @property
    def _tiles(self) -> tuple[Value, Value]:
        """Rows a tile, and tiles, [1] each."""
        return tile(self._own_places.size(0), changes(self.delta).integer().reduce("Sum", 0, keep=True))

    def filled(self, rows: Value) -> Value:
        each, tiles = self._tiles
        return rows.gather(self.nodes("Min", counted(self.nodes, each * tiles), rows.size(0) - 1))


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
