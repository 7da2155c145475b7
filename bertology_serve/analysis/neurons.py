"""FFN neurons: how much each matters to a task, and answers without some of them.

A neuron is one input of the projection down. Its gate ξ multiplies that input, so 0 masks it, and over a sequence's
rows t ∂L/∂ξ_j = Σ_t h_tj ∂L/∂h_tj, as for heads (Michel et al. 2019, arXiv 1905.10650).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bertology_serve.analysis.labelled import Trial
from bertology_serve.analysis.subject import Advance, silent
from bertology_serve.deltas.slots import DOWN
from bertology_serve.encoder.encoder import Encoder


@contextmanager
def watched(encoder: Encoder, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Passes the input [..., M] of every layer's projection down through ``change(layer, input)``."""
    handles = []
    for layer, path in enumerate(encoder.anatomy.slot(DOWN).paths):

        def hook(_: Any, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            return change(layer, inputs[0]), *inputs[1:]

        handles.append(encoder.model.get_submodule(str(path)).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked(encoder: Encoder, kept: Sequence[Sequence[int]]) -> Any:
    """A context in which only these neurons of each layer are heard."""
    slot = encoder.anatomy.slot(DOWN)
    masks = [torch.zeros(slot.inputs_of(layer)) for layer in range(slot.depth)]
    for mask, own in zip(masks, kept, strict=True):
        mask[list(own)] = 1.0
    return watched(encoder, lambda layer, x: x * masks[layer].to(x))


def neuron_importance(trial: Trial, advance: Advance = silent) -> list[Tensor]:
    """E_x |∂L(x)/∂ξ_j| at ξ = 1 over the trial's examples: [M] float64 a layer."""
    encoder = trial.subject.encoder
    slot = encoder.anatomy.slot(DOWN)
    totals = [torch.zeros(slot.inputs_of(layer), dtype=torch.float64) for layer in range(slot.depth)]
    one = torch.ones((), dtype=encoder.dtype, device=encoder.device, requires_grad=True)
    done = 0
    for items in trial.groups():
        batch, seen = trial.pack(items), dict[int, Tensor]()

        def keep(layer: int, x: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[layer] = x * one  # so that gradients are asked for below the first trained tensor, too
            return seen[layer]

        with watched(encoder, keep):
            loss = trial.loss(trial.output(batch), items)
        gradients = torch.autograd.grad(loss, [seen[layer] for layer in range(slot.depth)])
        owners = trial.owners(batch, items)
        for layer, gradient in enumerate(gradients):
            terms = (seen[layer].detach() * gradient).flatten(0, -2)
            own = terms.new_zeros(len(items), terms.shape[1]).index_add(0, owners, terms)
            totals[layer] += own.abs().double().sum(0).cpu()
        done += len(items)
        advance(done, len(trial.items))
    return [total / len(trial.items) for total in totals]
