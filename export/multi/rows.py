"""The rows of a batch whose sequences have prompts of their own, or none; packed, in whole tiles."""

from __future__ import annotations

from bertology_serve.export.direct.nodes import Value, counted
from bertology_serve.export.direct.rows import Packed, Text
from bertology_serve.export.multi.runs import Runs, changes, tile
from bertology_serve.export.multi.stacks import FIRST, LEAD, LENGTH, PREFIX_SHIFTED, SHIFTED
from bertology_serve.export.multi.tables import Tables

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
