"""The linears and norms of an encoder as nodes, with what deltas do to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from bertology_serve.encoder.bank import PROMPT, adapter, inner, scale
from bertology_serve.export.emitter.delta_inputs import GATED
from bertology_serve.export.emitter.nodes import Nodes, Value, either
from bertology_serve.export.emitter.products import PRODUCTS
from bertology_serve.export.emitter.row_nodes import Rows
from bertology_serve.export.emitter.updates import Updates
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ON_CPU, Precision
from bertology_serve.kinds.slots import Slot

Then = Callable[[Value], Value]


def same(y: Value) -> Value:
    """``y`` as it is: what a linear does by default with its output."""
    return y


class Modules:
    """Linears and norms by slot and layer, with what deltas do to them; rows [T, K] -> [T, N]."""

    def __init__(self, export_inputs: ExportInputs, updates: Updates, precision: Precision = "fp32") -> None:
        self.nodes: Nodes = updates.nodes
        self.updates, self.config, self.state = updates, export_inputs.config, export_inputs.state
        self.anatomy, self.activation = export_inputs.anatomy, export_inputs.activation
        self.words = export_inputs.words
        self.positions, self._columns = export_inputs.positions, export_inputs.columns if precision in ON_CPU else {}
        self._product, self._apart = PRODUCTS[precision], precision == "int8-row"

    def has(self, slot: str, layer: int = 0) -> bool:
        """Whether a layer has the module."""
        found = self.anatomy.slots.get(slot)
        return found is not None and found.paths[layer] is not None

    def own(self, name: str) -> Value | None:
        """A tensor of the encoder; ``None`` where it has none of that name."""
        tensor = self.state.get(name)
        return None if tensor is None else self.nodes.weight(name, tensor)

    def prompted(self, words: Value, rows: Rows) -> Value:
        """The words' vectors [T, E], at the prompt's rows the prompt's."""
        if rows.virtual is None or rows.which is None:
            return words
        virtual, which = rows.virtual.unsqueeze(1), rows.which
        return self.nodes.choose(
            self.updates.used(PROMPT), lambda: virtual.where(self.updates.vectors(which), words), lambda: words
        )

    def linear(self, slot: str, layer: int, x: Value, residual: Value | None = None, then: Then = same) -> Value:
        """``then(x W + b + residual)``, with low ranks, biases and factors, through the adapter that stands behind."""
        if slot not in GATED:
            x = self.gated(slot, layer, partial(same, x))
        linear, place, choose = _Linear(self, slot, layer, x, residual), adapter(slot), self.nodes.choose
        adapted = self.updates.used(place, layer)

        def through() -> Value:
            y = choose(linear.used, lambda: linear.changed(same, apart=True), lambda: linear.plain)
            return then(self.summed([y, self.updates.adapted(place, layer, y)], residual))

        def changed() -> Value:
            return choose(adapted, through, lambda: linear.changed(then))

        return choose(either(linear.used, adapted), changed, lambda: then(linear.unchanged()))

    def gated(self, slot: str, layer: int, x: Callable[[], Value]) -> Value:
        """What ``x`` builds, the input of a linear, times the factors of deltas."""
        place = inner(slot)
        return self.nodes.choose(
            self.updates.used(place, layer), lambda: x() * self.updates.factors(place, layer, 1.0), x
        )

    def frozen(self, path: str, x: Value) -> list[Value]:
        """``x W`` and, where there is one, ``b``."""
        weight, columns, bias = self.state[f"{path}.weight"], self._columns.get(path), self.own(f"{path}.bias")
        if columns is not None:
            x, weight = x * self.nodes.constant((1 / columns).numpy()), weight * columns
        y = self._product(x, f"{path}.weight", weight)
        return [y] if bias is None else [y, bias]

    def summed(self, terms: list[Value], residual: Value | None = None) -> Value:
        """As ONNX Runtime is quickest with it: a product and its bias as ``Add``, of which it makes one node.

        Where rows are quantised one by one a ``Sum``: its kernel of bias and GELU together is slower than the two.
        """
        if residual is None and len(terms) == 2 and not self._apart:
            return terms[0] + terms[1]
        return self.nodes.total(*terms, *([] if residual is None else [residual]))

    def shifted(self, slot: str, layer: int, *terms: Value) -> Value:
        """The sum of the terms [T, N] and of the biases that deltas put at a slot without low ranks."""

        def total(biases: Sequence[Value] = ()) -> Value:
            return self.nodes.total(*terms, *biases)

        used = self.updates.used(slot, layer)
        return self.nodes.choose(used, lambda: self.updates.added(slot, layer, terms[0], None, total), total)

    def norm(self, slot: str, layer: int, x: Value) -> Value:
        """``LN(x) + n g + b``, n without weight and bias; around an adapter twice (Pfeiffer et al. 2020).

        With an adapter it is ``LN(adapter(LN(x)) + x)``.
        """
        path, place, updates, choose = self.path(slot, layer), adapter(slot), self.updates, self.nodes.choose
        scaled_too, adapted = updates.used(scale(slot), layer), updates.used(place, layer)

        def weighted(rows: Value) -> Value:
            def scaled() -> Value:
                ones = self.nodes.constant(np.ones(self.state[f"{path}.weight"].shape, self.nodes.dtype.numpy()))
                change = self._layer_norm(rows, ones) * updates.factors(scale(slot), layer)
                return self.shifted(slot, layer, self._normed(path, rows), change)

            return choose(scaled_too, scaled, lambda: self.shifted(slot, layer, self._normed(path, rows)))

        def through() -> Value:
            return weighted(updates.adapted(place, layer, weighted(x)) + x)

        def changed() -> Value:
            return choose(adapted, through, lambda: weighted(x))

        return choose(either(updates.used(slot, layer), scaled_too, adapted), changed, lambda: self._normed(path, x))

    def _normed(self, path: str, x: Value) -> Value:
        return self._layer_norm(x, self.own(f"{path}.weight"), self.own(f"{path}.bias"))

    def _layer_norm(self, x: Value, weight: Value | None, bias: Value | None = None) -> Value:
        names = ("layer_norm_eps", "norm_eps")
        epsilon = next((float(getattr(self.config, name)) for name in names if hasattr(self.config, name)), 1e-12)
        return self.nodes("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def path(self, slot: str, layer: int) -> str:
        """The module's name in HuggingFace's model."""
        return str(self.anatomy.slot(slot).paths[layer])


class _Linear:
    """``x W + b + residual`` of one linear, with the updates of all slots that name it or a part of it."""

    def __init__(self, modules: Modules, slot: str, layer: int, x: Value, residual: Value | None) -> None:
        self.modules, self.updates, self.nodes, self.layer, self.x = modules, modules.updates, modules.nodes, layer, x
        path = modules.path(slot, layer)
        self.slots = [other for other in modules.anatomy.slots.values() if path in other.paths]
        self.residual, self.terms = residual, modules.frozen(path, x)
        if residual is None:  # made before the branches: product and bias are then one node to ONNX Runtime
            _ = self.plain
        self.scaled = self._any(scale(other.name) for other in self.slots)
        self.used = either(self._any(other.name for other in self.slots), self.scaled)

    def _any(self, places: Iterable[str]) -> Value | bool:
        return either(*(self.updates.used(place, self.layer) for place in places))

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
            parts = [part for slot in self.slots if (part := self._part(slot)) is not None]
            return then(self.modules.summed([self.plain, *parts], residual))

        def one() -> Value:
            start, own = self.plain, None
            if self.residual is not None:
                start, own = self.terms[0], (self.terms[1] if len(self.terms) > 1 else None)
            return self.updates.added(
                self.slots[0].name, self.layer, self.x, own, lambda b: then(self.modules.summed([start, *b], residual))
            )

        return several() if len(self.slots) > 1 else self.nodes.choose(self.scaled, several, one)

    def _part(self, slot: Slot) -> Value | None:
        """One slot's update and factors, in its columns of the linear's output; ``None`` or a 0 where it has none."""
        lo, hi = slot.part or (0, slot.outputs_of(self.layer))
        width = max(other.part[1] if other.part else other.outputs_of(self.layer) for other in self.slots)
        choose = self.nodes.choose
        used, scaled_too = (self.updates.used(place, self.layer) for place in (slot.name, scale(slot.name)))
        if used is False and scaled_too is False:
            return None

        def added(*more: Value) -> Value:
            def total(terms: Sequence[Value]) -> Value:
                sum_ = self.nodes.total(*more, *terms)
                return sum_ if (lo, hi) == (0, width) else self.nodes("Pad", sum_, [lo, width - hi], 0.0, [-1])

            return choose(
                used,
                lambda: self.updates.added(slot.name, self.layer, self.x, None, total),
                lambda: total([]) if more else self.nodes.value(0.0),
            )

        def scaled() -> Value:
            own = self.plain if slot.part is None else self.nodes("Slice", self.plain, [lo], [hi], [1])
            return added(own * self.updates.factors(scale(slot.name), self.layer))

        return choose(scaled_too, scaled, added)
