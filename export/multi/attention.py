"""Attention where every sequence may have a prefix of its own."""

from __future__ import annotations

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.export.direct.attention import Attention
from bertology_serve.export.direct.modules import Modules
from bertology_serve.export.direct.nodes import Value, counted, joined
from bertology_serve.export.multi.rows import Mixed
from bertology_serve.export.multi.stacks import LENGTH
from bertology_serve.export.multi.tables import Tables


class MixedAttention(Attention):
    """A prefix of V rows stands before the keys of every sequence of a batch, V that of the longest; masked beyond."""

    def __init__(self, modules: Modules, tables: Tables, rows: Mixed) -> None:
        super().__init__(modules, rows)
        self.tables = tables
        self._prefixes = tables.table(PREFIX, "rows").gather(rows.delta)
        self._lengths = tables.table(PREFIX, "form").gather(rows.delta).gather([LENGTH], 1)

    def _prefixed(self, layer: int, q: Value, k: Value, v: Value, mask: Value) -> Value:
        def prefixed() -> Value:
            return self._attended(q, self._behind("k", layer, k), self._behind("v", layer, v), self._wider(mask))

        return self.nodes.choose(self.tables.used(PREFIX, "rows"), prefixed, lambda: self._attended(q, k, v, mask))

    def _behind(self, column: str, layer: int, own: Value) -> Value:
        """The sequences' own keys or values [B, heads, R, D] behind those of their prefixes."""
        rows = self.tables.rows(PREFIX, column, layer, self._prefixes)
        shape = self.nodes("Concat", [0], [0], [self.parts.anatomy.heads_of(layer)], [self.width], axis=0)
        return joined(2, self.nodes("Reshape", rows, shape).transpose(0, 2, 1, 3), own)

    def _wider(self, mask: Value) -> Value:
        """The mask with columns for the prefixes, which every row of their sequence sees."""
        one, rows = self.nodes.value([1]), self.rows.columns
        seen = counted(self.nodes, self._prefixes.size(1)).unsqueeze(0) < self._lengths
        opened = self.nodes(
            "Expand", seen.where(0.0, self.nodes.lowest).unsqueeze(1, 2), joined(0, one, mask.size(1), rows, one)
        )
        return joined(3, opened, self.nodes("Expand", mask, joined(0, one, one, rows, one)))
