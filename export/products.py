"""Linears with their weights as [inputs, outputs], the way round that ONNX multiplies them."""

from __future__ import annotations

from torch import Tensor, nn


class Product(nn.Module):
    """``x weight + bias`` for x [..., K]; weight [K, N], bias [N] or ``None``.

    Where a linear were exported, the exporter would transpose its weight and give the result a name of its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def as_products(module: nn.Module) -> None:
    """Replaces every linear inside a module, in place; names of parameters stay what they were."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Product(child))
        else:
            as_products(child)
