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
