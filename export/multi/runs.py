"""Which delta each row of a batch is for, in tiles: a tile is ``c`` rows and the few deltas that own them.

Rows that lie next to each other and are for the same delta are a run. A tile of c rows touches at most S runs, so one
product of [n/c, c, K] with the stack rows of those S deltas, [n/c, S·R, K], has every product that is wanted; the rest is
multiplied by 0. No row is copied or padded, ranks need not be equal, and a batch sorted by delta does the least.
"""  # noqa: E501

from __future__ import annotations

import numpy as np

from bertology_serve.export.direct.nodes import Nodes, Value, counted, joined

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

    ``index`` [tiles · each] names the delta of every row. ``owners`` [tiles, S] are those of a tile, and ``mask``
    [tiles, each, S] is 1 where a row is for that owner.
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
        self.mask = nodes("Equal", run.unsqueeze(2), touched.unsqueeze(1)).real()

    def of(self, table: Value) -> Value:
        """table [D, R] -> [tiles, S · R], the entries of the deltas of each tile."""
        return self._flat(table.gather(self.owners))

    def owned(self, products: Value, table: Value) -> Value:
        """products [tiles, each, S · R] with those of other deltas' rows made 0; ``table`` [D, R] tells R."""
        shape = self.nodes("Concat", [0], [0], [-1], table.size(1), axis=0)
        apart = self.nodes("Reshape", products, shape) * self.mask.unsqueeze(3)
        return self.nodes("Reshape", apart, self.nodes("Concat", [0], [0], [-1], axis=0))

    def tiled(self, rows: Value) -> Value:
        """[tiles · each, K] -> [tiles, each, K]."""
        return self.nodes("Reshape", rows, self.nodes("Concat", [-1], self.each, rows.size(1), axis=0))

    def _flat(self, entries: Value) -> Value:
        return self.nodes("Reshape", entries, [0, -1])
