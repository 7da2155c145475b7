"""Child-Tuning (Xu et al. 2021, arXiv 2109.05687): only a part of the weights, the child network, gets a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from bertology_serve.encoder.live import LiveDelta
from bertology_serve.training.full_options import ChildTuning
from bertology_serve.training.layers import layer_paths
from bertology_serve.training.optimizer import trained
from bertology_serve.training.regulariser import Regulariser

Key = TypeVar("Key")


class ChildNetwork(Regulariser):
    """Weights outside the child have neither a gradient nor weight decay.

    Mode d: the child is the ``share`` of all weights in the encoder's layers whose Fisher information is largest: the
    squares of each batch's gradient, each tensor's clipped to a length of 1, summed over one pass through the training
    data at the pretrained weights. Embeddings and head are trained whole. Mode f: each step draws a child from all that
    is trained, and scales its gradient by ``1 / share``; AdamW's moments still move the rest a little.
    """

    def __init__(self, live: LiveDelta, options: ChildTuning) -> None:
        super().__init__(live)
        self.fixed, self.share = options.mode == "d", options.share
        self.parameters = trained(live)
        self.masks: dict[str, Tensor] = {}

    def begin(self, gradients: Callable[[], Iterator[None]]) -> None:
        if not self.fixed:
            return
        layers = tuple(f"model.{path}." for path in layer_paths(self.live.encoder.anatomy))
        own = {name: parameter for name, parameter in self.parameters.items() if name.startswith(layers)}
        fisher = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
        for _ in gradients():
            for name, parameter in own.items():
                if parameter.grad is not None:
                    clip_grad_norm_([parameter], 1.0)
                    fisher[name] += parameter.grad.square()
        self.masks = largest(fisher, self.share)

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step inside the child; the decay is made here, since AdamW's own moves every weight."""
        masks = {id(parameter): self._mask(name, parameter) for name, parameter in self.parameters.items()}
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            for parameter in group["params"]:
                mask = masks[id(parameter)]
                if parameter.grad is not None:
                    parameter.grad.mul_(mask if self.fixed else mask / self.share)
                    parameter.mul_(1.0 - group["lr"] * decay * mask)
        optimizer.step()
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.to(self.live.encoder.device) for name, mask in tensors.items()}

    def _mask(self, name: str, parameter: Tensor) -> Tensor:
        """1 inside the child, 0 outside, in the parameter's shape (or one number for all of it)."""
        if not self.fixed:
            return torch.empty_like(parameter).bernoulli_(self.share)
        return self.masks[name].to(parameter.dtype) if name in self.masks else parameter.new_ones(())


def largest(values: Mapping[Key, Tensor], share: float) -> dict[Key, Tensor]:
    """Where the largest ``share`` of all values lie (bool, in their shapes), ties included and zeros not."""
    flat = torch.cat([tensor.flatten() for tensor in values.values()])
    count = max(1, round(share * flat.numel()))
    least = flat.kthvalue(flat.numel() - count + 1).values
    return {name: (tensor >= least) & (tensor > 0) for name, tensor in values.items()}
