"""A probe on a scalar mix of all layers (Peters et al. 2018; Tenney et al. 2019, arXiv 1905.05950)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mix:
    """``weights`` [L + 1] of the layers, of sum 1; ``accuracy`` of the probe on held-out rows."""

    weights: Tensor
    accuracy: float

    @property
    def centre(self) -> float:
        """The mean layer, weighted."""
        return float((self.weights * torch.arange(len(self.weights))).sum())


def fit_mix(x: Tensor, y: Tensor, held: Tensor, gold: Tensor, classes: int, penalty: float, steps: int = 40) -> Mix:
    """Learns softmax weights over layers and one linear probe together, by L-BFGS from equal weights.

    x [L + 1, n, H] and ``held`` alike, standardised layer by layer with x's statistics; y [n], ``gold`` alike, int64.
    The objective is that of ``logistic.fit``; not convex in the weights, but without any random start.
    """
    mean, std = x.mean(1, keepdim=True), x.std(1, unbiased=False, keepdim=True)
    std = torch.where(std > 1e-7, std, torch.ones_like(std))
    features, others = (x - mean) / std, (held - mean) / std
    mix = torch.zeros(len(x), dtype=x.dtype, requires_grad=True)
    weight = torch.zeros(classes, x.shape[2], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([mix, weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def logits(rows: Tensor) -> Tensor:
        return F.linear(torch.einsum("l,lnh->nh", mix.softmax(0), rows), weight, bias)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(logits(features), y) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        accuracy = (logits(others).argmax(1) == gold).double().mean().item()
    return Mix(mix.detach().softmax(0), accuracy)
