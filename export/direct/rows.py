"""The rows of a batch inside the graph: T of them, each one token or one vector of the prompt.

Letters: B sequences of L columns as the caller padded them; R columns inside the graph, prompt included. ``Padded``
computes all B R rows. ``Packed`` computes only those that are no padding: linears, norms and activations then see
T rows, and the attention alone brings them into the grid [B, R] and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from bertology_serve.export.direct.nodes import Value, counted
from bertology_serve.export.rows import Weave


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

    def __init__(self, text: Text, weave: Weave) -> None:
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
