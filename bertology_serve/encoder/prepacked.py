"""Frozen linears with weights laid out once for oneDNN: on AMD processors twice as fast as ``F.linear``'s MKL."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def available() -> bool:
    """Whether this torch can run prepacked oneDNN linears."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Prepacked:
    """``y = x Wᵀ + b`` with W [N, K] in oneDNN's own layout. Frozen; differentiable in x."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = None if bias is None else bias.detach()
        self._weight = weight.detach()
        self._packed = _reorder(self._weight)
        self._transposed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], float32 on CPU."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]
        return _linear(x, self._packed, self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of x [..., K] from that of y [..., N]."""
        if self._transposed is None:
            self._transposed = _reorder(self._weight.T.contiguous())
        return _linear(gradient, self._transposed, None)


class _Frozen(torch.autograd.Function):
    """The linear as a function of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Prepacked) -> Tensor:
        ctx.linear = linear
        return _linear(x, linear._packed, linear.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.linear.backward(gradients[0].contiguous()), None


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def pays(width: int = 384, rows: int = 256, rounds: int = 5) -> bool:
    """Whether prepacking is faster than ``F.linear`` here, timed once on a product of that size (milliseconds)."""
    if not available():
        return False
    x, weight = torch.randn(rows, width), torch.randn(4 * width, width)
    prepacked = Prepacked(weight, None)
    with torch.inference_mode():
        return _best(lambda: prepacked(x), rounds) < 0.9 * _best(lambda: F.linear(x, weight), rounds)


def _best(call: Any, rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
