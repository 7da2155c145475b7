"""Mixout (Lee et al. 2019, arXiv 1909.11299): each step, some weights of the linears stand where they began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bertology_serve.encoder.live import LiveDelta
from bertology_serve.training.full_options import Mixout
from bertology_serve.training.regulariser import Regulariser


class MixedWeights(Regulariser):
    """For one gradient, W becomes ``(M∘W + (1-M)∘W₀ - p W₀) / (1-p) = W₀ + M∘(W - W₀) / (1-p)``.

    M is 1 with probability ``1 - p``, drawn for each weight and each bias of the linears by itself, so that the
    expectation is W; the gradient of W is that of the mixture times ``M / (1-p)``. The linears are the encoder's and
    those of the head that the base checkpoint has (BERT's pooler). The head's dropout is off: Mixout takes its place.
    """

    def __init__(self, live: LiveDelta, options: Mixout) -> None:
        super().__init__(live)
        self.p = options.p
        self.starts = [(parameter, parameter.detach().clone()) for parameter in _linears(live)]
        for module in live.head.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    @contextmanager
    def mixed(self) -> Iterator[None]:
        own, scales = self._mix()
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), value, scale in zip(self.starts, own, scales, strict=True):
                    parameter.copy_(value)
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)

    @torch.no_grad()
    def _mix(self) -> tuple[list[Tensor], list[Tensor]]:
        """Puts the mixtures in place; returns what stood there, and ``M / (1-p)``."""
        own, scales = [], []
        for parameter, start in self.starts:
            own.append(parameter.clone())
            scales.append(torch.empty_like(parameter).bernoulli_(1 - self.p).div_(1 - self.p))
            parameter.sub_(start).mul_(scales[-1]).add_(start)
        return own, scales


def _linears(live: LiveDelta) -> list[nn.Parameter]:
    """Weights and biases of the linears that have pretrained values, each once."""
    modules = [module for module in live.encoder.model.modules() if isinstance(module, nn.Linear)]
    found = [parameter for module in modules for parameter in module.parameters()]
    found += [parameter for _, base, parameter in live.head.named() if base in live.encoder.base_head]
    return list(dict.fromkeys(parameter for parameter in found if parameter.requires_grad))
