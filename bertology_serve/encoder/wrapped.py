"""The encoder's linears and LayerNorms, taking part in the pass: same parameters and names, deltas applied."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.passing import Current, Pass, Place
from bertology_serve.encoder.prepacked import Prepacked
from bertology_serve.kernels.segments import RowSegment, with_rows


class SlotLinear(nn.Linear):
    """A linear whose output rows get their deltas' low ranks, biases and bottleneck adapters."""

    current: Current
    places: list[Place]
    prepacked: Prepacked | None

    @classmethod
    def adopt(cls, linear: nn.Linear, current: Current) -> SlotLinear:
        """The same linear, with the very same parameters."""
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        module.current, module.places, module.prepacked = current, [], None
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; the leading dimensions are the batch's rows while a pass is under way."""
        y = super().forward(x) if self.prepacked is None else self.prepacked(x)
        now = self.current.it
        if now is None:
            return y
        flat = y.view(-1, y.shape[-1])
        out = flat
        for place in self.places:
            out = now.update(place, x.reshape(-1, x.shape[-1]), out)
            for segment in now.adapters(place):
                rows = slice(segment.lo, segment.hi)
                out = with_rows(out, segment.lo, segment.hi, out[rows] + now.adapter(place, segment, out[rows]))
        return y if out is flat else out.view(y.shape)


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
        """x [..., H] -> [..., H]."""
        y = super().forward(x)
        now = self.current.it
        if now is None:
            return y
        flat = y.view(-1, y.shape[-1])
        out = now.update(self.place, None, flat)
        for segment in now.adapters(self.place):
            out = self._pfeiffer(now, segment, x.reshape(-1, x.shape[-1]), out)
        return y if out is flat else out.view(y.shape)

    def _pfeiffer(self, now: Pass, segment: RowSegment, x: Tensor, y: Tensor) -> Tensor:
        """``LN(adapter(LN(s)) + s)`` for the segment's rows of s = x; y holds ``LN(s)``."""
        rows = slice(segment.lo, segment.hi)
        again = super().forward(now.adapter(self.place, segment, y[rows]) + x[rows])
        shifts = [s for s in now.plan.segments.get(self.place.slot, ()) if s.lo == segment.lo]
        for shift in shifts:
            again = again + now.pools.layer(self.place.slot, "b", self.place.layer)[shift.bias]
        return with_rows(y, segment.lo, segment.hi, again)


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
