"""The encoder's linears and norms as nodes, with what one delta, or every sequence's own, adds to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

import numpy as np
from torch import Tensor

from bertology_serve.encoder.bank import PROMPT, adapter, inner, scale
from bertology_serve.export.emitter.delta_inputs import Tables, adapter_places
from bertology_serve.export.emitter.nodes import ACTIVATION_NODES, Nodes, Value
from bertology_serve.export.emitter.products import PRODUCTS
from bertology_serve.export.emitter.row_nodes import Mixed, Rows
from bertology_serve.export.emitter.updates import Updates
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import Precision
from bertology_serve.kinds.slots import Slot

Then = Callable[[Value], Value]


def same(y: Value) -> Value:
    """Nothing more is done with it."""
    return y


class Modules:
    """Linears and norms by slot and layer; rows [T, K] -> [T, N]."""

    def __init__(self, nodes: Nodes, parts: ExportInputs, precision: Precision = "fp32") -> None:
        self.nodes, self.parts = nodes, parts
        self._product, self._apart = PRODUCTS[precision], precision == "int8-row"
        self._updates: dict[str, list[tuple[Slot, int]]] = defaultdict(list)
        self._adapters: dict[str, list[tuple[str, int]]] = defaultdict(list)
        effects = parts.effects
        for name in sorted(effects.low_rank.keys() | effects.bias.keys()):
            slot = parts.anatomy.slot(name)
            for layer in slot.present:
                self._updates[str(slot.paths[layer])].append((slot, layer))
        for name, unit in effects.bottleneck.items():
            for layer in unit.layers:
                self._adapters[str(parts.anatomy.slot(name).paths[layer])].append((name, layer))

    def has(self, slot: str, layer: int = 0) -> bool:
        """Whether a layer has the module."""
        found = self.parts.anatomy.slots.get(slot)
        return found is not None and found.paths[layer] is not None

    def own(self, name: str) -> Value | None:
        """A tensor of the encoder; ``None`` where it has none of that name."""
        tensor = self.parts.state.get(name)
        return None if tensor is None else self.nodes.weight(name, tensor)

    def mine(self, name: str, tensor: Tensor) -> Value:
        """A tensor of the delta."""
        return self.nodes.weight(self.parts.named(name), tensor)

    def prompted(self, words: Value, rows: Rows) -> Value:
        """The words' vectors [T, E], at the prompt's rows the prompt's."""
        prompt = self.parts.effects.prompt
        if prompt is None or rows.virtual is None:
            return words
        vectors = self.mine("prompt.vectors", prompt.vectors[None]).squeeze(0)
        return rows.virtual.unsqueeze(1).where(vectors.gather(rows.which), words)

    def linear(self, slot: str, layer: int, x: Value, residual: Value | None = None, then: Then = same) -> Value:
        """``then(x W + b + Σ updates)``, through the adapters that stand behind it, ``+ residual``."""
        path = self.path(slot, layer)
        terms = [*self.frozen(path, x), *self._added(path, x)]
        adapters = self._adapters.get(path, [])
        if adapters:
            y = self.nodes.total(*terms)
            for name, at in adapters:
                y = y + self._adapter(name, at, y)
            terms = [y]
        return then(self.summed(terms, residual))

    def gated(self, slot: str, layer: int, x: Callable[[], Value]) -> Value:
        """What ``x`` builds, the input of a linear, times the delta's factors."""
        return x()

    def frozen(self, path: str, x: Value) -> list[Value]:
        """``x W`` and, where there is one, ``b``."""
        y, bias = self._product(x, f"{path}.weight", self.parts.state[f"{path}.weight"]), self.own(f"{path}.bias")
        return [y] if bias is None else [y, bias]

    def summed(self, terms: list[Value], residual: Value | None = None) -> Value:
        """As ONNX Runtime is quickest with it: a product and its bias as ``Add``, of which it makes one node.

        Where rows are quantised one by one a ``Sum``: its kernel of bias and GELU together is slower than the two.
        """
        if residual is None and len(terms) == 2 and not self._apart:
            return terms[0] + terms[1]
        return self.nodes.total(*terms, *([] if residual is None else [residual]))

    def norm(self, slot: str, layer: int, x: Value) -> Value:
        """``LN(x) + Σ updates``; used again around an adapter: ``LN(adapter(LN(x)) + x)`` (Pfeiffer et al. 2020)."""
        path = self.path(slot, layer)
        y = self._normed(path, x)
        for name, at in self._adapters.get(path, []):
            y = self._normed(path, self._adapter(name, at, y) + x)
        return y

    def _normed(self, path: str, x: Value) -> Value:
        scale, bias = self.own(f"{path}.weight"), self.own(f"{path}.bias")
        y = self.nodes("LayerNormalization", x, scale, bias, axis=-1, epsilon=self._epsilon)
        return self.nodes.total(y, *self._added(path, x))

    @property
    def _epsilon(self) -> float:
        config = self.parts.config
        names = ("layer_norm_eps", "norm_eps")
        return next((float(getattr(config, name)) for name in names if hasattr(config, name)), 1e-12)

    def _added(self, path: str, x: Value) -> Iterator[Value]:
        """What low ranks and biases add to a module's output."""
        effects = self.parts.effects
        width = self.parts.state[f"{path}.weight"].shape[0]
        for slot, layer in self._updates.get(path, []):
            place, low, shift = f"{slot.name}.{layer}", effects.low_rank.get(slot.name), effects.bias.get(slot.name)
            lo, hi = slot.part or (0, width)
            if low is not None:
                right, left = low.at(slot, layer)
                a, b = self.mine(f"{place}.a", right.T), self.mine(f"{place}.b", left)
                yield self.widened(x @ a @ b, [0, lo, 0, width - hi])
            if shift is not None:
                yield self.widened(self.mine(f"{place}.bias", shift[layer, : slot.outputs_of(layer)]), [lo, width - hi])

    def widened(self, value: Value, pads: list[int]) -> Value:
        """Zeros around the columns that a slot names of a packed projection."""
        return self.nodes("Pad", value, pads, 0.0) if any(pads) else value

    def _adapter(self, name: str, layer: int, x: Value) -> Value:
        """``act(x D + b_d) U + b_u`` (Houlsby et al. 2019)."""
        unit, place = self.parts.effects.bottleneck[name], f"{name}.{layer}.adapter"
        down, up = self.mine(f"{place}.down", unit.down[layer].T), self.mine(f"{place}.up", unit.up[layer])
        down_bias = self.mine(f"{place}.down_bias", unit.down_bias[layer])
        up_bias = self.mine(f"{place}.up_bias", unit.up_bias[layer])
        return ACTIVATION_NODES[unit.activation](x @ down + down_bias) @ up + up_bias

    def path(self, slot: str, layer: int) -> str:
        return str(self.parts.anatomy.slot(slot).paths[layer])


class MixedModules(Modules):
    """Linears and norms by slot and layer."""

    def __init__(self, parts: ExportInputs, tables: Tables, rows: Mixed, precision: Precision = "fp32") -> None:
        super().__init__(tables.nodes, parts, precision)
        self.tables, self.changes, self.adapters = tables, Updates(tables, rows.runs), adapter_places(parts.anatomy)

    def prompted(self, words: Value, rows: Rows) -> Value:
        assert rows.virtual is not None
        assert rows.which is not None
        virtual, which = rows.virtual.unsqueeze(1), rows.which
        return self.nodes.choose(
            self.tables.used(PROMPT, "rows"),
            lambda: virtual.where(self.tables.rows(PROMPT, "v", 0, which), words),
            lambda: words,
        )

    def linear(self, slot: str, layer: int, x: Value, residual: Value | None = None, then: Then = same) -> Value:
        """``then(x W + b + residual)``, with low ranks and biases, through the adapters that stand behind it."""
        linear, name = _Linear(self, slot, layer, x, residual), adapter(slot)

        def through() -> Value:
            y = self.nodes.choose(linear.used, lambda: linear.changed(same, apart=True), lambda: linear.plain)
            return then(self.summed([y, self.changes.adapted(name, layer, y)], residual))

        def changed() -> Value:
            if slot not in self.adapters:
                return linear.changed(then)
            return self.nodes.choose(self.changes.used(name), through, lambda: linear.changed(then))

        used = linear.used | self.changes.used(name) if slot in self.adapters else linear.used
        return self.nodes.choose(used, changed, lambda: then(linear.unchanged()))

    def gated(self, slot: str, layer: int, x: Callable[[], Value]) -> Value:
        place = inner(slot)
        return self.nodes.choose(self.changes.used(place), lambda: x() * self.changes.factors(place, layer, 1.0), x)

    def norm(self, slot: str, layer: int, x: Value) -> Value:
        """``LN(x) + n g + b``, n without weight and bias; used again around an adapter: ``LN(adapter(LN(x)) + x)``."""
        path, name, changes, choose = self.path(slot, layer), adapter(slot), self.changes, self.nodes.choose

        def shifted(rows: Value, *more: Value) -> Value:
            def total(terms: Sequence[Value] = ()) -> Value:
                return self.nodes.total(self._normed(path, rows), *more, *terms)

            return choose(changes.used(slot), lambda: changes.added(slot, layer, rows, None, total), total)

        def weighted(rows: Value) -> Value:
            def scaled() -> Value:
                return shifted(rows, self._unweighted(path, rows) * changes.factors(scale(slot), layer))

            return choose(changes.used(scale(slot)), scaled, lambda: shifted(rows))

        def through() -> Value:
            y = weighted(x)
            return weighted(self.changes.adapted(name, layer, y) + x)

        def changed() -> Value:
            if slot not in self.adapters:
                return weighted(x)
            return choose(changes.used(name), through, lambda: weighted(x))

        used = changes.used(slot) | changes.used(scale(slot))
        used = used | changes.used(name) if slot in self.adapters else used
        return choose(used, changed, lambda: self._normed(path, x))

    def _unweighted(self, path: str, x: Value) -> Value:
        """The norm without weight and bias."""
        ones = self.nodes.constant(np.ones(self.parts.state[f"{path}.weight"].shape, np.float32))
        return self.nodes("LayerNormalization", x, ones, axis=-1, epsilon=self._epsilon)


class _Linear:
    """``x W + b + residual`` of one linear, with the updates of all slots that name it or a part of it."""

    def __init__(self, modules: MixedModules, slot: str, layer: int, x: Value, residual: Value | None) -> None:
        self.modules, self.changes, self.nodes, self.layer, self.x = modules, modules.changes, modules.nodes, layer, x
        path = modules.path(slot, layer)
        self.slots = [other for other in modules.parts.anatomy.slots.values() if path in other.paths]
        self.residual, self.terms = residual, modules.frozen(path, x)
        if residual is None:  # made before the branches: product and bias are then one node to ONNX Runtime
            _ = self.plain
        self.scaled = self._any(scale(other.name) for other in self.slots)
        self.used = self._any(other.name for other in self.slots) | self.scaled

    def _any(self, places: Iterable[str]) -> Value:
        return reduce(Value.__or__, map(self.changes.used, places))

    @property
    def plain(self) -> Value:
        """``x W + b``."""
        return self.modules.summed(self.terms)

    def unchanged(self) -> Value:
        """Where no delta changes it."""
        return self.modules.summed(self.terms, self.residual)

    def changed(self, then: Then, apart: bool = False) -> Value:
        """Where one does; ``apart`` leaves the residual out."""
        residual = None if apart else self.residual

        def several() -> Value:
            return then(self.modules.summed([self.plain, *map(self._part, self.slots)], residual))

        def one() -> Value:
            start, own = self.plain, None
            if self.residual is not None:
                start, own = self.terms[0], (self.terms[1] if len(self.terms) > 1 else None)
            return self.changes.added(
                self.slots[0].name, self.layer, self.x, own, lambda b: then(self.modules.summed([start, *b], residual))
            )

        return several() if len(self.slots) > 1 else self.nodes.choose(self.scaled, several, one)

    def _part(self, slot: Slot) -> Value:
        """One slot's update and factors, in its columns of the linear's output; a 0 where it has none."""
        lo, hi = slot.part or (0, slot.outputs_of(self.layer))
        width = max(other.part[1] if other.part else other.outputs_of(self.layer) for other in self.slots)
        choose, used, nothing = self.nodes.choose, self.changes.used, self.nodes.value(0.0)

        def widened(update: Value) -> Value:
            return self.modules.widened(update, [0, lo, 0, width - hi])

        def added(*more: Value) -> Value:
            def total(terms: Sequence[Value]) -> Value:
                return widened(self.nodes.total(*more, *terms))

            return choose(
                used(slot.name),
                lambda: self.changes.added(slot.name, self.layer, self.x, None, total),
                lambda: total([]) if more else nothing,
            )

        def scaled() -> Value:
            own = self.plain if slot.part is None else self.nodes("Slice", self.plain, [lo], [hi], [1])
            return added(own * self.changes.factors(scale(slot.name), self.layer))

        return choose(used(scale(slot.name)), scaled, added)
