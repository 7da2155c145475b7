"""What deltas do to an encoder, as nodes: of one delta, whose tensors are in the file, or of many, given as inputs.

The encoder is built once, on top of ``Updates``. Whether a delta changes a place is known while the graph of one delta
is built: what it leaves alone costs no node there. In the graph for many a batch decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bertology_serve.encoder.bank import PREFIX, PROMPT, adapter, inner, scale, update_layers
from bertology_serve.export.emitter.delta_inputs import ADAPTER_ACTIVATIONS, LENGTH, Tables
from bertology_serve.export.emitter.nodes import ACTIVATION_NODES, Condition, Nodes, Value, joined
from bertology_serve.export.emitter.row_nodes import LengthGroup, MixedRows, Rows
from bertology_serve.export.export_inputs import ExportInputs

Added = Callable[[Sequence[Value]], Value]
"""What is done with the terms that are added."""
KINDS = (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT)


class Updates(ABC):
    """Low ranks, biases, factors, adapters, prompts and prefixes, by the name of their pool (``encoder.bank``).

    All but ``used`` may be called only where the place is used: inside ``Nodes.choose``.
    """

    nodes: Nodes

    @abstractmethod
    def used(self, place: str, layer: int = 0) -> Condition:
        """Whether a delta of the batch changes anything there."""

    @abstractmethod
    def added(self, place: str, layer: int, x: Value, own: Value | None, then: Added) -> Value:
        """``then`` of the terms ``x Aᵀ B + b`` and ``own``, a bias of the encoder's: x [T, K], terms [T, N] or [N]."""

    @abstractmethod
    def factors(self, place: str, layer: int, plus: float = 0.0) -> Value:
        """[T, N] or [N]: the factors less 1, ``plus`` something."""

    @abstractmethod
    def adapted(self, place: str, layer: int, x: Value) -> Value:
        """``act(x Dᵀ + b_d) U + b_u`` (Houlsby et al. 2019): x [T, H] -> [T, H]."""

    @abstractmethod
    def vectors(self, which: Value) -> Value:
        """The prompt's vectors [T, E] of those numbers [T]."""

    @abstractmethod
    def prefix(self, column: str, layer: int, group: LengthGroup, heads: int, width: int) -> Value:
        """[heads, B, V, width]: the trained keys (``k``) or values (``v``) of each sequence of a group."""

    @abstractmethod
    def prefix_length(self, group: LengthGroup) -> Value:
        """[B or 1, 1]: the rows of each sequence's prefix."""


class OneDelta(Updates):
    """The effects of one delta, its tensors named ``delta.NAME.SLOT.LAYER.PART`` in the file."""

    def __init__(self, nodes: Nodes, export_inputs: ExportInputs, rows: Rows) -> None:
        self.nodes, self.export_inputs, self.rows, self.effects = nodes, export_inputs, rows, export_inputs.effects
        effects, every = self.effects, range(export_inputs.anatomy.layers)
        self._layers: dict[str, Collection[int]] = dict.fromkeys(effects.low_rank.keys() | effects.bias.keys(), every)
        self._layers |= {scale(slot): every for slot in effects.scale} | {inner(slot): every for slot in effects.inner}
        self._layers |= update_layers(effects)
        self._layers |= {adapter(slot): unit.layers for slot, unit in effects.bottleneck.items()}
        self._layers |= {PROMPT: every} if effects.prompt else {}
        self._layers |= {PREFIX: every} if effects.prefix else {}

    def _mine(self, name: str, tensor: Tensor) -> Value:
        return self.nodes.weight(self.export_inputs.named(name), tensor)

    def used(self, place: str, layer: int = 0) -> bool:
        return layer in self._layers.get(place, ())

    def added(self, place: str, layer: int, x: Value, own: Value | None, then: Added) -> Value:
        low, shift = self.effects.low_rank.get(place), self.effects.bias.get(place)
        slot, terms = self.export_inputs.anatomy.slot(place), [] if own is None else [own]
        if low is not None:
            a, b = low.at(slot, layer)
            terms.append(x @ self._mine(f"{place}.{layer}.a", a.T) @ self._mine(f"{place}.{layer}.b", b))
        if shift is not None:
            terms.append(self._mine(f"{place}.{layer}.bias", shift[layer, : slot.outputs_of(layer)]))
        return then(terms)

    def factors(self, place: str, layer: int, plus: float = 0.0) -> Value:
        name, _, side = place.rpartition(".")
        slot, effects = self.export_inputs.anatomy.slot(name), self.effects
        factors, width = (
            (effects.inner[name], slot.inputs_of(layer))
            if place == inner(name)
            else (effects.scale[name], slot.outputs_of(layer))
        )
        own = self._mine(f"{name}.{layer}.{side}", factors[layer, :width])
        return own + plus if plus else own

    def adapted(self, place: str, layer: int, x: Value) -> Value:
        slot, _, _ = place.rpartition(".")
        unit, name = self.effects.bottleneck[slot], f"{slot}.{layer}.adapter"
        down, up = self._mine(f"{name}.down", unit.down[layer].T), self._mine(f"{name}.up", unit.up[layer])
        shift, out = (
            self._mine(f"{name}.{side}", bias[layer])
            for side, bias in (("down_bias", unit.down_bias), ("up_bias", unit.up_bias))
        )
        return ACTIVATION_NODES[unit.activation](x @ down + shift) @ up + out

    def vectors(self, which: Value) -> Value:
        assert self.effects.prompt is not None
        return self._mine("prompt.vectors", self.effects.prompt.vectors[None]).squeeze(0).gather(which)

    def prefix(self, column: str, layer: int, group: LengthGroup, heads: int, width: int) -> Value:
        assert self.effects.prefix is not None
        trained = {"k": self.effects.prefix.keys, "v": self.effects.prefix.values}[column][layer, :, : heads * width]
        by_head = trained.reshape(1, trained.shape[0], heads, width).transpose(1, 2)
        rows = self._mine(f"prefix.{layer}.{'keys' if column == 'k' else 'values'}", by_head).transpose(1, 0, 2, 3)
        return self.nodes("Expand", rows, self.nodes("Concat", [1], group.batch, [1], [1], axis=0))

    def prefix_length(self, group: LengthGroup) -> Value:
        assert self.effects.prefix is not None
        return self.nodes.constant(np.array([[self.effects.prefix.keys.shape[1]]]))


@dataclass(frozen=True)
class Owned:
    """A place's stack rows in each tile, those of its S deltas, R ranks or units and a bias each.

    ``numbers`` [tiles, S · (R + 1)]; ``ranks`` [tiles, c, S · (R + 1)] is true where a row is for the delta and it is
    no bias, ``biases`` 1 where it is the bias.
    """

    numbers: Value
    ranks: Value
    biases: Value


class ManyDeltas(Updates):
    """Every row's own delta, out of the stacks of all.

    Which rows of the stacks belong to a tile is the same in every layer, so it is looked up once, outside of every
    branch.
    """

    def __init__(self, tables: Tables, rows: MixedRows) -> None:
        self.tables, self.runs, self.nodes = tables, rows.runs, tables.nodes
        self._owned = {
            place.name: self._found(place.name, table)
            for place in tables.places.values()
            for table in ("ranks", "units")
            if table in place.tables
        }
        if PREFIX in tables.places:
            self._prefixes = tables.table(PREFIX, "rows").gather(rows.delta)
            self._prefix_lengths = tables.table(PREFIX, "form").gather(rows.delta).gather([LENGTH], 1)

    def used(self, place: str, layer: int = 0) -> Condition:
        found = self.tables.places.get(place)
        return False if found is None else self.tables.used(place, "bias" if "bias" in found.tables else "rows")

    def added(self, place: str, layer: int, x: Value, own: Value | None, then: Added) -> Value:
        def low_rank() -> Value:
            low = self.runs.tiled(x, self.tables.width(place, "a", layer)) @ self._rows(place, "a", layer)
            return then([self._spread(place, "b", layer, low), *([] if own is None else [own])])

        def biases() -> Value:
            return then([self._biases(place, "b", layer, own).gather(self.runs.index)])

        if "a" not in self.tables.places[place].columns:
            return biases()
        return self.nodes.choose(self.tables.used(place, "ranks"), low_rank, biases)

    def factors(self, place: str, layer: int, plus: float = 0.0) -> Value:
        own = self.nodes.value(plus) if plus else None
        return self._biases(place, "g", layer, own).gather(self.runs.index)

    def adapted(self, place: str, layer: int, x: Value) -> Value:
        numbers = self._owned[place].numbers
        shift = self.tables.rows(place, "down_bias", layer, numbers).squeeze(2).unsqueeze(1)
        products = self.runs.tiled(x, self.tables.width(place, "down", layer)) @ self._rows(place, "down", layer)
        return self._spread(place, "up", layer, self._activated(place, products + shift))

    def vectors(self, which: Value) -> Value:
        return self.tables.rows(PROMPT, "v", 0, which)

    def prefix(self, column: str, layer: int, group: LengthGroup, heads: int, width: int) -> Value:
        rows = self.tables.rows(PREFIX, column, layer, group.of(self._prefixes))
        shape = self.nodes("Concat", [0], [0], [heads], [width], axis=0)
        return self.nodes("Reshape", rows, shape).transpose(2, 0, 1, 3)

    def prefix_length(self, group: LengthGroup) -> Value:
        return group.of(self._prefix_lengths)

    def _found(self, place: str, table: str) -> Owned:
        """Looked up where the batch has such a delta."""
        stand_in = [np.zeros((1,) * rank, kind.numpy()) for rank, kind in zip((2, 3, 3), KINDS, strict=True)]

        def looked_up() -> list[Value]:
            every = joined(1, self.tables.table(place, table), self.tables.table(place, "bias"))
            return [self.runs.of(every), *self.runs.owned(every)]

        def nothing() -> list[Value]:
            return list(map(self.nodes.constant, stand_in))

        return Owned(*self.nodes.choose_all(self.tables.used(place, table), KINDS, looked_up, nothing))

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
        act = ACTIVATION_NODES[ADAPTER_ACTIVATIONS[number]]
        if number == len(ADAPTER_ACTIVATIONS) - 1:
            return act(hidden)
        is_it = self.nodes("Equal", kind, number)
        return self.nodes.choose(is_it, lambda: act(hidden), lambda: self._alike(hidden, kind, number + 1))

    def _each(self, place: str, hidden: Value) -> Value:
        each = self.tables.table(place, "units").size(1) + 1
        kinds = self.runs.of(self.tables.table(place, "activation"))
        repeated = self.nodes("Expand", kinds.unsqueeze(2), self.nodes("Concat", [1], [1], each, axis=0))
        which = self.nodes("Reshape", repeated, [0, 1, -1])
        out = ACTIVATION_NODES[ADAPTER_ACTIVATIONS[-1]](hidden)
        for number, name in enumerate(ADAPTER_ACTIVATIONS[:-1]):
            out = self.nodes("Equal", which, number).where(ACTIVATION_NODES[name](hidden), out)
        return out
