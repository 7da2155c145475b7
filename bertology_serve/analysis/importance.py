"""How much each head and each FFN neuron matters to a task, and which stay when a share of them goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bertology_serve.analysis.labelled import Gates, TaskEvaluation
from bertology_serve.analysis.subject_model import Advance, head_numbers, silent
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.kinds.slots import DOWN


def importance(trial: TaskEvaluation, advance: Advance = silent) -> Tensor:
    """I_h = E_x |∂L(x)/∂ξ_h| at ξ = 1, over the trial's examples (Michel et al. 2019, eq. 2): [L, heads] float64.

    Every sequence has gates of its own, so that one backward pass a batch gives each example's gradient; L(x) sums
    the loss terms of an example.
    """
    anatomy = trial.subject.encoder.anatomy
    total = torch.zeros(anatomy.layers, anatomy.heads, dtype=torch.float64)
    done = 0
    for items in trial.groups():
        batch = trial.pack(items)
        gates = torch.ones(
            batch.sequences, anatomy.layers, anatomy.heads,
            dtype=trial.subject.encoder.dtype, device=batch.ids.device, requires_grad=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(trial.loss(trial.output(batch, Gates(gates)), items), gates)
        owners = [number for number, item in enumerate(items) for _ in item.encodings]
        owner = torch.tensor([owners[original] for original in batch.order], device=gradient.device)
        own = gradient.new_zeros(len(items), *gradient.shape[1:]).index_add(0, owner, gradient)
        total += own.abs().double().sum(0).cpu()
        done += len(items)
        advance(done, len(trial.items))
    return total / len(trial.items)


def normalised(values: Tensor) -> Tensor:
    """Importances [L, heads] with the Euclidean norm of each layer 1, as Michel et al. compare heads across layers."""
    norms: Tensor = values.norm(dim=1, keepdim=True)
    return values / norms.clamp(min=torch.finfo(values.dtype).tiny)


def left_out(trial: TaskEvaluation, advance: Advance = silent) -> Tensor:
    """How much the mean loss rises when one head alone is masked: [L, heads] float64."""
    anatomy = trial.subject.encoder.anatomy
    rises = torch.zeros(anatomy.layers, anatomy.heads, dtype=torch.float64)
    whole = trial.measure()["loss"]
    numbers = head_numbers(anatomy)
    for done, number in enumerate(numbers, 1):
        gates = torch.ones(rises.shape, dtype=trial.subject.encoder.dtype, device=trial.subject.encoder.device)
        gates.view(-1)[number] = 0.0
        rises.view(-1)[number] = trial.measure(gates)["loss"] - whole
        advance(done, len(numbers))
    return rises


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


def neuron_importance(trial: TaskEvaluation, advance: Advance = silent) -> list[Tensor]:
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


def kept(values: Sequence[Tensor], share: float, multiple: int = 1) -> tuple[tuple[int, ...], ...]:
    """Numbers that stay in each layer, rising, when ``share`` of all goes, those of the lowest value first.

    values: [n] a layer, compared across layers as they are. The most important of a layer always stays; with
    ``multiple`` as many more as make the layer's number a multiple of it, as far as the layer has them.
    """
    order = sorted((value, layer) for layer, own in enumerate(values) for value in own.tolist())
    left = [len(own) for own in values]
    going = round(share * sum(left))
    for _, layer in order:
        if going and left[layer] > 1:
            left[layer] -= 1
            going -= 1
    counts = [min(len(own), -(-count // multiple) * multiple) for own, count in zip(values, left, strict=True)]
    return tuple(
        tuple(sorted(own.argsort(descending=True, stable=True)[:count].tolist()))
        for own, count in zip(values, counts, strict=True)
    )
