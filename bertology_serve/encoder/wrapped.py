"""The encoder's linears and LayerNorms, taking part in the pass: same parameters and names, deltas applied."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.joined import Joined
from bertology_serve.encoder.passing import Current, Pass, Place
from bertology_serve.encoder.prepacked import Prepacked


class SlotLinear(nn.Linear):
    """A linear whose output rows get their deltas' low ranks, biases and bottleneck adapters."""

    current: Current
    places: list[Place]
    prepacked: Prepacked | None
    joined: Joined | None

    @classmethod
    def adopt(cls, linear: nn.Linear, current: Current) -> SlotLinear:
        """The same linear, with the very same parameters."""
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        module.current, module.places, module.prepacked, module.joined = current, [], None, None
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; the leading dimensions are the batch's rows while a pass is under way."""
        now = self.current.it
        if now is None:
            return self._base(x)
        y = self._updated(now, x)
        for place in self.places:
            y = now.adapted(place, y, y)
        return y.view(*x.shape[:-1], self.out_features)

    def _updated(self, now: Pass, x: Tensor) -> Tensor:
        """x [..., K] -> [T, N] with low ranks and biases."""
        if now.gates(self.places):
            x = now.gated(self.places, x.reshape(-1, self.in_features))
        joined = None if now.scales(self.places) else self.joined
        if joined is not None and (found := joined.slice(now, self, x)) is not None:
            return found
        flat = x.reshape(-1, self.in_features)
        if self.prepacked is None:
            return now.linear(self.places, flat, self.weight, self.bias)
        return now.updated(self.places, flat, self.prepacked(flat))

    def _base(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.prepacked is None else self.prepacked(x)


class SlotNorm(nn.LayerNorm):
    """A LayerNorm whose output rows get their deltas' biases, and Pfeiffer adapters around it."""

    current: Current
    place: Place

    @classmethod
    def adopt(cls, norm: nn.LayerNorm, current: Current) -> SlotNorm:
        """The same norm, with the very same parameters."""
        module = cls(norm.normalized_shape, norm.eps, device="meta")
        module.weight, module.bias = norm.weight, norm.bias
        module.current = current
        module.train(norm.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]; where s = x has a Pfeiffer adapter, ``LN(adapter(LN(s)) + s)``."""
        now = self.current.it
        if now is None:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = now.norm(self.place, flat, self)
        summed = now.adapted(self.place, flat, y)
        if summed is not flat:
            y = now.norm(self.place, summed, self)
        return y.view(x.shape)


def wrap(model: nn.Module, anatomy: Anatomy, current: Current) -> None:
    """Replaces every linear and norm that is a slot by its wrapped form, in place."""
    for slot in anatomy.slots.values():
        for layer, path in enumerate(slot.paths):
            if path is None:
                continue
            module = model.get_submodule(path)
            if isinstance(module, nn.Linear):
                linear = _adopted(model, path, module, SlotLinear, current)
                linear.places.append(Place(slot.name, layer, slot.part))
                linear.places.sort(key=lambda place: place.part or (0, 0))
            elif isinstance(module, nn.LayerNorm):
                norm = _adopted(model, path, module, SlotNorm, current)
                norm.place = Place(slot.name, layer)


def _adopted(model: nn.Module, path: str, module: Any, form: Any, current: Current) -> Any:
    if isinstance(module, form):
        return module
    parent, _, name = path.rpartition(".")
    wrapped = form.adopt(module, current)
    setattr(model.get_submodule(parent), name, wrapped)
    return wrapped
