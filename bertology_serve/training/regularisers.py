"""What forms of full fine-tuning do around each step: Mixout, Child-Tuning; plain training does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from bertology_serve.encoder.trainable import TrainableDelta, trained
from bertology_serve.training.method_options import ChildTuning, Mixout


class Regulariser:
    """Nothing, in every place where a form may do something.

    A form is made while the weights are the pretrained ones. It draws from torch's global generator, so that a run
    continues with the numbers that it would have had.
    """

    def __init__(self, live: TrainableDelta) -> None:
        self.live = live

    def begin(self, gradients: Callable[[], Iterator[None]]) -> None:
        """Before the first step, at the pretrained weights.

        Iterating over ``gradients()`` puts the gradient of each batch of the training data into the parameters, once,
        without dropout.
        """

    def mixed(self) -> AbstractContextManager[None]:
        """Holds while the gradient of one batch is made, all its micro-batches included."""
        return nullcontext()

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, on gradients that were clipped."""
        optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to continue."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``tensors``."""


class MixedWeights(Regulariser):
    """For one gradient, W becomes ``(M∘W + (1-M)∘W₀ - p W₀) / (1-p) = W₀ + M∘(W - W₀) / (1-p)``.

    M is 1 with probability ``1 - p``, drawn for each weight and each bias of the linears by itself, so that the
    expectation is W; the gradient of W is that of the mixture times ``M / (1-p)``. The linears are the encoder's and
    those of the head that the base checkpoint has (BERT's pooler). The head's dropout is off: Mixout takes its place.
    """

    def __init__(self, live: TrainableDelta, options: Mixout) -> None:
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


def _linears(live: TrainableDelta) -> list[nn.Parameter]:
    """Weights and biases of the linears that have pretrained values, each once."""
    modules = [module for module in live.encoder.model.modules() if isinstance(module, nn.Linear)]
    found = [parameter for module in modules for parameter in module.parameters()]
    found += [parameter for _, base, parameter in live.head.named() if base in live.encoder.base_head]
    return list(dict.fromkeys(parameter for parameter in found if parameter.requires_grad))


Key = TypeVar("Key")


class ChildNetwork(Regulariser):
    """Weights outside the child have neither a gradient nor weight decay.

    Mode d: the child is the ``share`` of all weights in the encoder's layers whose Fisher information is largest: the
    squares of each batch's gradient, each tensor's clipped to a length of 1, summed over one pass through the training
    data at the pretrained weights. Embeddings and head are trained whole. Mode f: each step draws a child from all that
    is trained, and scales its gradient by ``1 / share``; AdamW's moments still move the rest a little.
    """

    def __init__(self, live: TrainableDelta, options: ChildTuning) -> None:
        super().__init__(live)
        self.fixed, self.share = options.mode == "d", options.share
        self.parameters = trained(live)
        self.masks: dict[str, Tensor] = {}

    def begin(self, gradients: Callable[[], Iterator[None]]) -> None:
        if not self.fixed:
            return
        layers = tuple(f"model.{path}." for path in self.live.encoder.anatomy.layer_paths)
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
