"""The encoder's linears and norms, with what every sequence's delta adds to them.

What no delta of a batch changes is computed as if there were none: each change stands in a branch of its own. What
comes after a module is built into the branches, for one that handed its input on unchanged would copy it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import numpy as np

from bertology_serve.deltas.slots import Slot
from bertology_serve.encoder.bank import PROMPT, adapter, inner, scale
from bertology_serve.export.direct.modules import Modules, Then, same
from bertology_serve.export.direct.nodes import Value
from bertology_serve.export.direct.rows import Rows
from bertology_serve.export.multi.rows import Mixed
from bertology_serve.export.multi.stacks import adapter_places
from bertology_serve.export.multi.tables import Tables
from bertology_serve.export.multi.updates import Updates
from bertology_serve.export.parts import Parts
from bertology_serve.export.spec import Precision


class MixedModules(Modules):
    """Linears and norms by slot and layer."""

    def __init__(self, parts: Parts, tables: Tables, rows: Mixed, precision: Precision = "fp32") -> None:
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
