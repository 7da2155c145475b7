"""Linear CKA between two representations of the same rows (Kornblith et al. 2019, arXiv 1905.00414), streamed."""

from __future__ import annotations

import torch
from torch import Tensor


class LinearCka:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, Frobenius norms, from sums that rows are added to batch by batch.

    Memory is three [H, H] float64 matrices, however many rows there are. Also gathers how far rows moved:
    ‖y - x‖ / ‖x‖, averaged over rows.
    """

    def __init__(self, width: int) -> None:
        self.products = torch.zeros(3, width, width, dtype=torch.float64)  # XᵀX, YᵀY, YᵀX
        self.sums = torch.zeros(2, width, dtype=torch.float64)
        self.rows = 0
        self.moved = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x and y [n, H] of the two models."""
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        for product, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True):
            product += left.T @ right
        self.sums += torch.stack([x.sum(0), y.sum(0)])
        self.rows += len(x)
        self.moved += float(((y - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)).sum())

    @property
    def value(self) -> float:
        """Between 0 and 1; 1 for representations that differ by rotation, scale and shift only."""
        x, y = self.sums
        centred = [
            product - torch.outer(left, right) / self.rows
            for product, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True)
        ]
        own_x, own_y, cross = (matrix.square().sum() for matrix in centred)
        return float(cross / (own_x.sqrt() * own_y.sqrt()).clamp(min=1e-300))

    @property
    def drift(self) -> float:
        """Mean of ‖y - x‖ / ‖x‖ over the rows."""
        return self.moved / max(1, self.rows)
