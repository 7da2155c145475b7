"""A delta beside the frozen weights of a HuggingFace model: its updates as modules around the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.kernels.segments import ACTIVATIONS
from bertology_serve.kinds.effects import Bottleneck, Effects
from bertology_serve.kinds.slots import Anatomy, Slot


class Update(nn.Module):
    """``x a b + bias`` on the columns ``part`` of an output of width ``outputs``; a [K, R], b [R, n], bias [n]."""

    def __init__(self, slot: Slot, outputs: int, a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.a = None if a is None else _frozen(a.T)
        self.b = None if b is None else _frozen(b)
        self.bias = None if bias is None else _frozen(bias)
        lo, hi = slot.part or (0, outputs)
        self.margins = (lo, outputs - hi)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., N] with the update of x [..., K] added."""
        added = y.new_zeros(()) if self.bias is None else self.bias
        if self.a is not None and self.b is not None:
            low = x @ self.a @ self.b
            added = low if self.bias is None else low + self.bias
        return y + (F.pad(added, self.margins) if any(self.margins) else added)


class AdapterModule(nn.Module):
    """``act(rows down + down_bias) up + up_bias`` for rows [..., H]; down [H, M], up [M, H]."""

    def __init__(self, unit: Bottleneck, layer: int) -> None:
        super().__init__()
        self.down, self.down_bias = _frozen(unit.down[layer].T), _frozen(unit.down_bias[layer])
        self.up, self.up_bias = _frozen(unit.up[layer]), _frozen(unit.up_bias[layer])
        self.activation = unit.activation

    def forward(self, rows: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](rows @ self.down + self.down_bias)
        return hidden @ self.up + self.up_bias


class Beside(nn.Module):
    """A linear (or DeBERTa's convolution) and what deltas add to its output, slot by slot."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.updates, self.adapters = nn.ModuleDict(), nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x)
        for update in self.updates.values():
            y = update(x, y)
        for adapter in self.adapters.values():
            y = y + adapter(y)
        return y


class BesideConv(Beside):
    """The same for a convolution: rows [B, K, R] -> [B, N, R], biases only."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x)
        for update in self.updates.values():
            y = update(y, y.transpose(1, 2)).transpose(1, 2)
        return y


class BesideNorm(Beside):
    """A LayerNorm with its biases, used twice where a Pfeiffer adapter stands: ``LN(adapter(LN(s)) + s)``."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._normed(x)
        for adapter in self.adapters.values():
            y = self._normed(adapter(y) + x)
        return y

    def _normed(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x)
        for update in self.updates.values():
            y = update(x, y)
        return y


def attach(model: nn.Module, effects: Effects, anatomy: Anatomy) -> dict[str, str]:
    """Puts low ranks, biases and adapters around the model's modules, in place.

    Returns the names of the tensors added: ``slot.layer.part`` (``query.0.a``) by their name in the model.
    """
    for name in sorted(effects.low_rank.keys() | effects.bias.keys()):
        slot = anatomy.slot(name)
        for layer in slot.present:
            around, width = _around(model, str(slot.paths[layer]))
            around.updates[f"{name}-{layer}"] = _update(effects, slot, layer, width)
    for name, unit in effects.bottleneck.items():
        for layer in unit.layers:
            around, _ = _around(model, str(anatomy.slot(name).paths[layer]))
            around.adapters[f"{name}-{layer}"] = AdapterModule(unit, layer)
    return {path: _public(path) for path, _ in model.named_parameters() if ".updates." in path or ".adapters." in path}


def _update(effects: Effects, slot: Slot, layer: int, outputs: int) -> Update:
    low, shift = effects.low_rank.get(slot.name), effects.bias.get(slot.name)
    a, b = (None, None) if low is None else low.at(slot, layer)
    return Update(slot, outputs, a, b, None if shift is None else shift[layer, : slot.outputs_of(layer)])


def _around(model: nn.Module, path: str) -> tuple[Beside, int]:
    """The wrapper of a module, put there on first use, and the module's output width."""
    module: Any = model.get_submodule(path)
    if not isinstance(module, Beside):
        forms = {nn.Conv1d: BesideConv, nn.LayerNorm: BesideNorm}
        form = next((form for kind, form in forms.items() if isinstance(module, kind)), Beside)
        parent, _, leaf = path.rpartition(".")
        module = form(module)
        setattr(model.get_submodule(parent), leaf, module)
    own: Any = module.own
    return module, int(own.weight.shape[0])


def _public(path: str) -> str:
    """``...updates.query-0.a`` -> ``query.0.a``; ``...adapters.output-0.down`` -> ``output.0.adapter.down``."""
    _, group, place, leaf = path.rsplit(".", 3)
    place = place.replace("-", ".")
    return f"{place}.{leaf}" if group == "updates" else f"{place}.adapter.{leaf}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to("cpu", torch.float32).contiguous(), requires_grad=False)
