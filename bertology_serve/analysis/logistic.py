"""Linear probes: multinomial logistic regression on standardised features, solved to its only optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Logistic:
    """``logits = (x - mean) / std Wᵀ + b``; weight [C, H], bias [C], mean and std [H]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, C]."""
        return F.linear((x - self.mean) / self.std, self.weight, self.bias)


def fit(x: Tensor, y: Tensor, classes: int, penalty: float, steps: int = 100) -> Logistic:
    """Minimises mean cross-entropy + penalty / 2 ‖W‖² by L-BFGS from zero: no seed, the same answer every time.

    x [n, H], y [n] int64 below ``classes``. Features without variance get a standard deviation of 1.
    """
    mean, std = x.mean(0), x.std(0, unbiased=False)
    std = torch.where(std > 1e-7, std, torch.ones_like(std))
    features = (x - mean) / std
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), y) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return Logistic(weight.detach(), bias.detach(), mean, std)


@dataclass(frozen=True)
class Score:
    """``accuracy`` and ``macro_f1`` as fractions, ``bits``: mean cross-entropy."""

    accuracy: float
    macro_f1: float
    bits: float


def score(probe: Logistic, x: Tensor, y: Tensor) -> Score:
    """How a probe does on x [n, H] with the right classes y [n]; F1 over the classes that occur or are answered."""
    logits = probe.logits(x)
    found = logits.argmax(1)
    classes = torch.unique(torch.cat([y, found])).tolist()
    scores = []
    for label in classes:
        hits = ((y == label) & (found == label)).sum().item()
        scores.append(2 * hits / ((y == label).sum().item() + (found == label).sum().item()))
    return Score(
        accuracy=(found == y).double().mean().item(),
        macro_f1=sum(scores) / len(scores),
        bits=F.cross_entropy(logits.double(), y).item() / math.log(2),
    )
