"""What deltas add to the output of a module, each to its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bertology_serve.export.emitter.delta_inputs import ADAPTER_ACTIVATIONS, Tables
from bertology_serve.export.emitter.nodes import ACTIVATION_NODES as NODES
from bertology_serve.export.emitter.nodes import Nodes, Value, joined
from bertology_serve.export.emitter.row_nodes import Runs

Added = Callable[[Sequence[Value]], Value]
"""What is done with the terms that are added."""
KINDS = (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT)


@dataclass(frozen=True)
class Owned:
    """A place's stack rows in each tile, those of its S deltas, R ranks or units and a bias each.

    ``numbers`` [tiles, S · (R + 1)]; ``ranks`` [tiles, c, S · (R + 1)] is true where a row is for the delta and it is
    no bias, ``biases`` 1 where it is the bias.
    """

    numbers: Value
    ranks: Value
    biases: Value


class Updates:
    """Low ranks, biases, factors and adapters of all places, for the rows of one batch.

    Made outside of every branch: which rows of the stacks belong to a tile is the same in every layer. Call the methods
    inside ``Nodes.choose``.
    """

    def __init__(self, tables: Tables, runs: Runs) -> None:
        self.tables, self.runs = tables, runs
        self.nodes: Nodes = tables.nodes
        self._owned = {
            place.name: self._found(place.name, table)
            for place in tables.places.values()
            for table in ("ranks", "units")
            if table in place.tables
        }

    def used(self, place: str) -> Value:
        """Whether a delta of the batch changes anything there."""
        return self.tables.used(place, "bias")

    def added(self, place: str, layer: int, x: Value, own: Value | None, then: Added) -> Value:
        """``then`` of the terms ``x Aᵀ B + b`` and ``own``, a bias of the encoder's: x [T, K], terms [T, N] or [N]."""

        def low_rank() -> Value:
            low = self.runs.tiled(x, self.tables.width(place, "a", layer)) @ self._rows(place, "a", layer)
            return then([self._spread(place, "b", layer, low), *([] if own is None else [own])])

        def biases() -> Value:
            return then([self._biases(place, "b", layer, own).gather(self.runs.index)])

        if "a" not in self.tables.places[place].columns:
            return biases()
        return self.nodes.choose(self.tables.used(place, "ranks"), low_rank, biases)

    def factors(self, place: str, layer: int, plus: float = 0.0) -> Value:
        """[T, N]: every row's factors less 1, ``plus`` something."""
        own = self.nodes.value(plus) if plus else None
        return self._biases(place, "g", layer, own).gather(self.runs.index)

    def adapted(self, place: str, layer: int, x: Value) -> Value:
        """``act(x Dᵀ + b_d) U + b_u``: x [T, H] -> [T, H], 0 for rows whose delta has no adapter there."""
        numbers = self._owned[place].numbers
        shift = self.tables.rows(place, "down_bias", layer, numbers).squeeze(2).unsqueeze(1)
        products = self.runs.tiled(x, self.tables.width(place, "down", layer)) @ self._rows(place, "down", layer)
        return self._spread(place, "up", layer, self._activated(place, products + shift))

    def _found(self, place: str, table: str) -> Owned:
        """Looked up where the batch has such a delta."""
        nodes, stand_in = (
            self.nodes,
            [np.zeros((1,) * rank, kind.numpy()) for rank, kind in zip((2, 3, 3), KINDS, strict=True)],
        )

        def looked_up() -> list[Value]:
            every = joined(1, self.tables.table(place, table), self.tables.table(place, "bias"))
            return [self.runs.of(every), *self.runs.owned(every)]

        return Owned(
            *nodes.choose_all(
                self.tables.used(place, table), KINDS, looked_up, lambda: list(map(nodes.constant, stand_in))
            )
        )

    def _rows(self, place: str, column: str, layer: int) -> Value:
        """[tiles, K, S · (R + 1)]: what rows of a tile are multiplied with."""
        return self.tables.rows(place, column, layer, self._owned[place].numbers).transpose(0, 2, 1)

    def _spread(self, place: str, column: str, layer: int, low: Value) -> Value:
        """low [tiles, c, S · (R + 1)] of each row's own delta, and 1 for its bias, times the stack's rows -> [T, N]."""
        owned = self._owned[place]
        rows = self.tables.rows(place, column, layer, owned.numbers)
        return (owned.ranks.where(low, owned.biases) @ rows).reshape(-1, self.tables.width(place, column, layer))

    def _biases(self, place: str, column: str, layer: int, own: Value | None) -> Value:
        """[D, N]: the bias of every delta of the batch."""
        rows = self.tables.rows(place, column, layer, self.tables.table(place, "bias").squeeze(1))
        return rows if own is None else rows + own

    def _activated(self, place: str, hidden: Value) -> Value:
        """Each owner's activation: hidden [tiles, c, S · (M + 1)]; that of all adapters alone where they agree."""
        kinds, units = self.tables.table(place, "activation"), self.tables.table(place, "units")
        there = self.nodes("Greater", units.reduce("Max", 1, keep=True), 0)
        least, most = (
            there.where(kinds, other).reduce(how, 0).squeeze(0)
            for how, other in (("Min", len(ADAPTER_ACTIVATIONS) - 1), ("Max", 0))
        )
        return self.nodes.choose(
            self.nodes("Equal", least, most), lambda: self._alike(hidden, most), lambda: self._each(place, hidden)
        )

    def _alike(self, hidden: Value, kind: Value, number: int = 0) -> Value:
        """The activation of that ``kind``, which is at least ``number``."""
        act = NODES[ADAPTER_ACTIVATIONS[number]]
        if number == len(ADAPTER_ACTIVATIONS) - 1:
            return act(hidden)
        is_it = self.nodes("Equal", kind, number)
        return self.nodes.choose(is_it, lambda: act(hidden), lambda: self._alike(hidden, kind, number + 1))

    def _each(self, place: str, hidden: Value) -> Value:
        each = self.tables.table(place, "units").size(1) + 1
        kinds = self.runs.of(self.tables.table(place, "activation"))
        repeated = self.nodes("Expand", kinds.unsqueeze(2), self.nodes("Concat", [1], [1], each, axis=0))
        which = self.nodes("Reshape", repeated, [0, 1, -1])
        out = NODES[ADAPTER_ACTIVATIONS[-1]](hidden)
        for number, name in enumerate(ADAPTER_ACTIVATIONS[:-1]):
            out = self.nodes("Equal", which, number).where(NODES[name](hidden), out)
        return out
