"""The encoder's linears and norms, each with what the delta adds to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from torch import Tensor

from bertology_serve.deltas.slots import Slot
from bertology_serve.export.direct.activations import ACTIVATIONS
from bertology_serve.export.direct.nodes import Nodes, Value
from bertology_serve.export.direct.products import PRODUCTS
from bertology_serve.export.direct.rows import Rows
from bertology_serve.export.parts import Parts
from bertology_serve.export.spec import Precision

Then = Callable[[Value], Value]


def same(y: Value) -> Value:
    """Nothing more is done with it."""
    return y


class Modules:
    """Linears and norms by slot and layer; rows [T, K] -> [T, N]."""

    def __init__(self, nodes: Nodes, parts: Parts, precision: Precision = "fp32") -> None:
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
        return ACTIVATIONS[unit.activation](x @ down + down_bias) @ up + up_bias

    def path(self, slot: str, layer: int) -> str:
        return str(self.parts.anatomy.slot(slot).paths[layer])
