"""How much each head matters to a task: the gradient of the loss by its gate."""

from __future__ import annotations

import torch
from torch import Tensor

from bertology_serve.analysis.gates import Gates
from bertology_serve.analysis.labelled import Trial
from bertology_serve.analysis.subject import Advance, head_numbers, silent


def importance(trial: Trial, advance: Advance = silent) -> Tensor:
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


def left_out(trial: Trial, advance: Advance = silent) -> Tensor:
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
