"""The encoder's linears and norms, with what every sequence's delta adds to them.

What no delta of a batch changes is computed as if there were none: each change stands in a branch of its own. What
comes after a module is built into the branches, for one that handed its input on unchanged would copy it.
"""

from __future__ import annotations

from bertology_serve.deltas.slots import Slot
from bertology_serve.encoder.bank import PROMPT, adapter
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

    def norm(self, slot: str, layer: int, x: Value) -> Value:
        """``LN(x) + b``; used again around an adapter: ``LN(adapter(LN(x)) + x)``."""
        path, name = self.path(slot, layer), adapter(slot)

        def shifted(rows: Value) -> Value:
            return self.changes.added(slot, layer, rows, None, lambda b: self._normed(path, rows) + b)

        def shifted_if_used(rows: Value) -> Value:
            return self.nodes.choose(self.changes.used(slot), lambda: shifted(rows), lambda: self._normed(path, rows))

        def through() -> Value:
            y = shifted_if_used(x)
            return shifted_if_used(self.changes.adapted(name, layer, y) + x)

        def changed() -> Value:
            if slot not in self.adapters:
                return shifted(x)
            return self.nodes.choose(self.changes.used(name), through, lambda: shifted(x))

        used = self.changes.used(slot)
        used = used | self.changes.used(name) if slot in self.adapters else used
        return self.nodes.choose(used, changed, lambda: self._normed(path, x))


class _Linear:
    """``x W + b + residual`` of one linear, with the updates of all slots that name it or a part of it."""

    def __init__(self, modules: MixedModules, slot: str, layer: int, x: Value, residual: Value | None) -> None:
        self.modules, self.changes, self.nodes, self.layer, self.x = modules, modules.changes, modules.nodes, layer, x
        path = modules.path(slot, layer)
        self.slots = [other for other in modules.parts.anatomy.slots.values() if path in other.paths]
        self.residual, (self.product, *bias) = residual, modules.frozen(path, x)
        self.bias = bias[0] if bias else None
        if residual is None:  # made before the branches: product and bias are then one node to ONNX Runtime
            _ = self.plain
        self.used = self.changes.used(self.slots[0].name)
        for other in self.slots[1:]:
            self.used = self.used | self.changes.used(other.name)

    @property
    def plain(self) -> Value:
        """``x W + b``."""
        return self.product if self.bias is None else self.product + self.bias

    def unchanged(self) -> Value:
        """Where no delta changes it."""
        if self.residual is None:
            return self.plain
        return self.modules.summed([self.product, *([] if self.bias is None else [self.bias])], self.residual)

    def changed(self, then: Then, apart: bool = False) -> Value:
        """Where one does; ``apart`` leaves the residual out."""
        residual = None if apart else self.residual
        if len(self.slots) > 1:
            return then(self.modules.summed([self.plain, *map(self._part, self.slots)], residual))
        start, own = (self.plain, None) if self.residual is None else (self.product, self.bias)
        return self.changes.added(
            self.slots[0].name, self.layer, self.x, own, lambda b: then(self.modules.summed([start, b], residual))
        )

    def _part(self, slot: Slot) -> Value:
        """One slot's update, in its columns of the linear's output; a 0 where it is not used."""
        lo, hi = slot.part or (0, slot.outputs)
        width = max(other.part[1] if other.part else other.outputs for other in self.slots)

        def widened(update: Value) -> Value:
            return self.nodes("Pad", update, [0, lo, 0, width - hi], 0.0)

        return self.nodes.choose(
            self.changes.used(slot.name),
            lambda: self.changes.added(slot.name, self.layer, self.x, None, widened),
            lambda: self.nodes.value(0.0),
        )
