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
        linear = _Linear(self, slot, layer, x)
        if slot not in self.adapters:
            return linear(residual, then)
        name = adapter(slot)

        def through() -> Value:
            y = linear(None, same)
            return then(self.summed([y, self.changes.adapted(name, layer, y)], residual))

        return self.nodes.choose(self.changes.used(name), through, lambda: linear(residual, then))

    def norm(self, slot: str, layer: int, x: Value) -> Value:
        """``LN(x) + b``; used again around an adapter: ``LN(adapter(LN(x)) + x)``."""
        if slot not in self.adapters:
            return self._shifted(slot, layer, x)
        name = adapter(slot)

        def through() -> Value:
            y = self._shifted(slot, layer, x)
            return self._shifted(slot, layer, self.changes.adapted(name, layer, y) + x)

        return self.nodes.choose(self.changes.used(name), through, lambda: self._shifted(slot, layer, x))

    def _shifted(self, slot: str, layer: int, x: Value) -> Value:
        def normed() -> Value:
            return self._normed(self.path(slot, layer), x)

        return self.nodes.choose(
            self.changes.used(slot), lambda: self.changes.added(slot, layer, x, None, lambda b: normed() + b), normed
        )


class _Linear:
    """``x W + b`` of one linear with the updates of all slots that name it or a part of it."""

    def __init__(self, modules: MixedModules, slot: str, layer: int, x: Value) -> None:
        self.modules, self.changes, self.nodes, self.layer, self.x = modules, modules.changes, modules.nodes, layer, x
        path = modules.path(slot, layer)
        self.slots = [other for other in modules.parts.anatomy.slots.values() if path in other.paths]
        self.product, *bias = modules.frozen(path, x)
        self.bias = bias[0] if bias else None
        self.whole = self.product if self.bias is None else self.product + self.bias

    def __call__(self, residual: Value | None, then: Then) -> Value:
        used = [self.changes.used(slot.name) for slot in self.slots]
        anywhere = used[0]
        for one in used[1:]:
            anywhere = anywhere | one
        return self.nodes.choose(
            anywhere, lambda: self._changed(residual, then), lambda: then(self._unchanged(residual))
        )

    def _unchanged(self, residual: Value | None) -> Value:
        """Where nothing else is added, product and bias are one node to ONNX Runtime."""
        if residual is None:
            return self.whole
        return self.modules.summed([self.product, *([] if self.bias is None else [self.bias])], residual)

    def _changed(self, residual: Value | None, then: Then) -> Value:
        if len(self.slots) > 1:
            return then(self.modules.summed([self.whole, *map(self._part, self.slots)], residual))
        start, own = (self.whole, None) if residual is None else (self.product, self.bias)
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
