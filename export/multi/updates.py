"""What deltas add to the output of a module, each to its own rows."""

from __future__ import annotations

from bertology_serve.export.direct.activations import ACTIVATIONS as NODES
from bertology_serve.export.direct.modules import Then
from bertology_serve.export.direct.nodes import Nodes, Value, joined
from bertology_serve.export.multi.runs import Runs
from bertology_serve.export.multi.stacks import ACTIVATIONS
from bertology_serve.export.multi.tables import Tables


class Updates:
    """Low ranks, biases and adapters of all places, for the rows of one batch. Call them inside ``Nodes.choose``."""

    def __init__(self, tables: Tables, runs: Runs) -> None:
        self.tables, self.runs = tables, runs
        self.nodes: Nodes = tables.nodes

    def used(self, place: str) -> Value:
        """Whether a delta of the batch changes anything there."""
        return self.tables.used(place, "bias")

    def added(self, place: str, layer: int, x: Value, own: Value | None, then: Then) -> Value:
        """``then(x Aᵀ B + b + own)``: x [T, K]; ``own`` [N] is a bias of the encoder's, the sum [T, N]."""

        def low_rank() -> Value:
            table = self.tables.table(place, "ranks")
            ranks = self.runs.of(table)
            a = self.tables.rows(place, "a", layer, ranks)
            low = self.runs.owned(self.runs.tiled(x) @ a.transpose(0, 2, 1), table)
            return then(self._spread(place, "b", layer, low, ranks, own))

        def biases() -> Value:
            return then(self._biases(place, "b", layer, own).gather(self.runs.index))

        if "a" not in self.tables.places[place].columns:
            return biases()
        return self.nodes.choose(self.tables.used(place, "ranks"), low_rank, biases)

    def adapted(self, place: str, layer: int, x: Value) -> Value:
        """``act(x Dᵀ + b_d) U + b_u``: x [T, H] -> [T, H], 0 for rows whose delta has no adapter there."""
        table, runs = self.tables.table(place, "units"), self.runs
        units = runs.of(table)
        down = self.tables.rows(place, "down", layer, units)
        shift = self.tables.rows(place, "down_bias", layer, units).squeeze(2).unsqueeze(1)
        hidden = self._activated(place, runs.tiled(x) @ down.transpose(0, 2, 1) + shift, table)
        return self._spread(place, "up", layer, runs.owned(hidden, table), units)

    def _spread(self, place: str, column: str, layer: int, low: Value, ranks: Value, own: Value | None = None) -> Value:
        """low [tiles, c, S · R] times the stack's rows, and each owner's bias with the coefficient 1 -> [T, N]."""
        rows = self.tables.rows(place, column, layer, ranks)
        rows = joined(1, rows, self._biases(place, column, layer, own).gather(self.runs.owners))
        return self._out(place, column, layer, joined(2, low, self.runs.mask), rows)

    def _biases(self, place: str, column: str, layer: int, own: Value | None) -> Value:
        """[D, N]: the bias of every delta of the batch."""
        rows = self.tables.rows(place, column, layer, self.tables.table(place, "bias").squeeze(1))
        return rows if own is None else rows + own

    def _out(self, place: str, column: str, layer: int, coefficients: Value, rows: Value) -> Value:
        return (coefficients @ rows).reshape(-1, self.tables.places[place].width(column, layer))

    def _activated(self, place: str, hidden: Value, units: Value) -> Value:
        """Each owner's activation: hidden [tiles, c, S · M]."""
        kinds = self.runs.of(self.tables.table(place, "activation"))
        each = self.nodes("Expand", kinds.unsqueeze(2), self.nodes("Concat", [1], [1], units.size(1), axis=0))
        which = self.nodes("Reshape", each, [0, 1, -1])
        out = NODES[ACTIVATIONS[-1]](hidden)
        for number, name in enumerate(ACTIVATIONS[:-1]):
            out = self.nodes("Equal", which, number).where(NODES[name](hidden), out)
        return out
