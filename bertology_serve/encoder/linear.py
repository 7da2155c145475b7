"""The encoder's linears and LayerNorms, deltas applied; query, key and value in one launch; weights for oneDNN."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.encoder.forward_context import CurrentContext, ForwardContext, SlotPlace
from bertology_serve.kinds.slots import KEY, QUERY, VALUE, Anatomy

M = TypeVar("M", bound=nn.Module)
W = TypeVar("W", bound=nn.Module)


class SlotLinear(nn.Linear):
    """A linear whose output rows get their deltas' low ranks, biases and bottleneck adapters."""

    current: CurrentContext
    places: list[SlotPlace]
    prepacked: Prepacked | None
    joined: Joined | None

    @classmethod
    def adopt(cls, linear: nn.Linear, current: CurrentContext) -> SlotLinear:
        """The same linear, with the very same parameters."""
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        module.current, module.places, module.prepacked, module.joined = current, [], None, None
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; the leading dimensions are the batch's rows while a pass is under way."""
        now = self.current.value
        if now is None:
            return self._base(x)
        y = self._updated(now, x)
        for place in self.places:
            y = now.adapted(place, y, y)
        return y.view(*x.shape[:-1], self.out_features)

    def _updated(self, now: ForwardContext, x: Tensor) -> Tensor:
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

    current: CurrentContext
    place: SlotPlace

    @classmethod
    def adopt(cls, norm: nn.LayerNorm, current: CurrentContext) -> SlotNorm:
        """The same norm, with the very same parameters."""
        module = cls(norm.normalized_shape, norm.eps, device="meta")
        module.weight, module.bias = norm.weight, norm.bias
        module.current = current
        module.train(norm.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]; where s = x has a Pfeiffer adapter, ``LN(adapter(LN(s)) + s)``."""
        now = self.current.value
        if now is None:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = now.norm(self.place, flat, self)
        summed = now.adapted(self.place, flat, y)
        if summed is not flat:
            y = now.norm(self.place, summed, self)
        return y.view(x.shape)


def wrap(model: nn.Module, anatomy: Anatomy, current: CurrentContext) -> None:
    """Replaces every linear and norm that is a slot by its wrapped form, in place."""
    for slot in anatomy.slots.values():
        for layer, path in enumerate(slot.paths):
            if path is None:
                continue
            module = model.get_submodule(path)
            if isinstance(module, nn.Linear):
                linear = _adopted(model, path, module, SlotLinear, SlotLinear.adopt, current)
                linear.places.append(SlotPlace(slot.name, layer, slot.part))
                linear.places.sort(key=lambda place: place.part or (0, 0))
            elif isinstance(module, nn.LayerNorm):
                norm = _adopted(model, path, module, SlotNorm, SlotNorm.adopt, current)
                norm.place = SlotPlace(slot.name, layer)


def _adopted(
    model: nn.Module,
    path: str,
    module: M,
    form: type[W],
    adopt: Callable[[M, CurrentContext], W],
    current: CurrentContext,
) -> W:
    if isinstance(module, form):
        return module
    parent, _, name = path.rpartition(".")
    wrapped = adopt(module, current)
    setattr(model.get_submodule(parent), name, wrapped)
    return wrapped


ATTENTION = (QUERY, KEY, VALUE)


class Joined:
    """Linears x [T, K] -> [T, N] as the slices of one, x -> [T, n N].

    The members' weights become views of one tensor: nothing is stored twice, names and values stay. The first member
    that is called computes for all; the others, called with the very same x, take their slices.
    """

    def __init__(self, members: Sequence[SlotLinear]) -> None:
        width = members[0].out_features
        self.places = [
            SlotPlace(place.slot, place.layer, (at * width, (at + 1) * width))
            for at, member in enumerate(members)
            for place in member.places
        ]
        self.weight = torch.cat([member.weight.detach() for member in members])
        self.bias = None
        if members[0].bias is not None:
            self.bias = torch.cat([member.bias.detach() for member in members])
        for at, member in enumerate(members):
            mine = slice(at * width, (at + 1) * width)
            member.weight = nn.Parameter(self.weight[mine], requires_grad=False)
            if self.bias is not None:
                member.bias = nn.Parameter(self.bias[mine], requires_grad=False)
        self._members = list(members)
        self._input: Tensor | None = None
        self._slices: list[Tensor] = []

    def slice(self, now: ForwardContext, member: SlotLinear, x: Tensor) -> Tensor | None:
        """The member's y [T, N] for x [..., K]; ``None`` where the members before it were not given this x."""
        at = self._members.index(member)
        if at == 0:
            flat = x.reshape(-1, x.shape[-1])
            self._slices = list(now.linear(self.places, flat, self.weight, self.bias).chunk(len(self._members), 1))
            self._input = x
        if x is not self._input:
            return None
        found = self._slices[at]
        if at == len(self._members) - 1:
            self._input, self._slices = None, []
        return found


def join(model: nn.Module, anatomy: Anatomy) -> bool:
    """Joins the query, key and value of every layer, where they are frozen linears of one shape; says whether any."""
    found = [_joined(members) for members in _attention_linears(model, anatomy)]
    return any(found)


def part(model: nn.Module, anatomy: Anatomy) -> None:
    """Every linear by itself again, on weights of its own."""
    for members in _attention_linears(model, anatomy):
        for member in members:
            if member.joined is not None:
                member.joined = None
                member.weight = nn.Parameter(member.weight.detach().clone(), requires_grad=False)
                if member.bias is not None:
                    member.bias = nn.Parameter(member.bias.detach().clone(), requires_grad=False)


def _joined(members: Sequence[SlotLinear]) -> bool:
    shapes = {(member.in_features, member.out_features, member.bias is None) for member in members}
    places = [member.places[0].part for member in members if len(member.places) == 1]
    trained = any(parameter.requires_grad for member in members for parameter in member.parameters())
    if trained or len(shapes) != 1 or places != [None] * len(ATTENTION):
        return False
    joined = Joined(members)
    for member in members:
        member.joined = joined
    return True


def _attention_linears(model: nn.Module, anatomy: Anatomy) -> Iterable[list[SlotLinear]]:
    """The distinct modules of query, key and value, layer by layer."""
    for paths in zip(*(anatomy.slot(name).paths for name in ATTENTION), strict=True):
        if None not in paths:
            yield [model.get_submodule(str(path)) for path, _ in groupby(paths)]  # type: ignore[misc]


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this torch can run prepacked oneDNN linears, on this processor in that dtype."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Prepacked:
    """``y = x Wᵀ + b`` with W [N, K] in oneDNN's own layout. Frozen; differentiable in x.

    In bfloat16 x, W and b are rounded to it, sums are in float32, and y is rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        self._weight = weight.detach()
        self._packed = _reorder(self._weight.to(dtype))
        self._transposed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], float32 on CPU."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], without gradients."""
        return _linear(x.to(self.dtype), self._packed, self.bias).to(x.dtype)

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of x [..., K] from that of y [..., N]."""
        if self._transposed is None:
            self._transposed = _reorder(self._weight.T.contiguous().to(self.dtype))
        return _linear(gradient.to(self.dtype), self._transposed, None).to(gradient.dtype)


class _Frozen(torch.autograd.Function):
    """The linear as a function of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Prepacked) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.backward(gradients[0].contiguous()), None


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


ROWS, CLEARLY = (16, 256), 0.9**2
"""The products that ``pays`` times, and what the product of their ratios must be below: a tenth faster on each."""


def pays(dtype: torch.dtype = torch.float32, width: int = 384, rounds: int = 10) -> bool:
    """Whether prepacking is faster than ``F.linear`` here, and in bfloat16 than in float32, too.

    Timed once on the product of a few rows and on that of many (milliseconds); the product of both ratios decides, as
    either alone may lie close to it. All take turns: what else the machine does meets them alike.
    """
    if not available(dtype):
        return False
    weight, ratio = torch.randn(4 * width, width), 1.0
    ways: list[Callable[[Tensor], Tensor]] = [partial(F.linear, weight=weight)]
    ways += (Prepacked(weight, None, one) for one in dict.fromkeys((torch.float32, dtype)))
    for rows in ROWS:
        x, seconds = torch.randn(rows, width), [list[float]() for _ in ways]
        with torch.inference_mode():
            for _ in range(1 + rounds):
                for way, own in zip(ways, seconds, strict=True):
                    start = time.perf_counter()
                    way(x)
                    own.append(time.perf_counter() - start)
        *others, ours = (min(own[1:]) for own in seconds)
        ratio *= ours / min(others)
    return ratio < CLEARLY
