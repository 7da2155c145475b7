from __future__ import annotations

from typing import Any

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.methods import set_rate
from bertology_serve.training.regularisers import ChildNetwork, largest
from bertology_serve.training.trainer import Trainer
from tests.training.live import trainer

LAYER = "model.encoder.layer."


def child(encoder: Encoder, mode: str, share: float = 0.3, **values: Any) -> Trainer:
    options = {"child-tuning": {"mode": mode, "share": share}}
    return trainer(encoder, method="child-tuning", options=options, learning_rate=1e-2, **values)


def parameters(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in one.parameters.items()}


def test_fisher_mask_is_that_of_a_plain_loop(bert: Encoder):
    """Squares of batch gradients at the pretrained point, each tensor's clipped to 1; the top share over all layers."""
    one = child(bert, "d", 0.2)
    one.live.eval()
    fisher: dict[str, torch.Tensor] = {}
    batches = [one.items[start : start + 5] for start in range(0, len(one.items), 5)]
    for batch in batches:
        one.live.zero_grad()
        one.gradient(batch)
        for name, parameter in one.parameters.items():
            if name.startswith(LAYER):
                clipped = parameter.grad.double() * min(1.0, 1.0 / (parameter.grad.double().norm().item() + 1e-6))
                fisher[name] = fisher.get(name, 0) + clipped**2 / len(batches)
    one.live.zero_grad()
    values = torch.cat([tensor.flatten() for tensor in fisher.values()])
    floor = values.sort(descending=True).values[round(0.2 * values.numel()) - 1]
    one.regulariser.begin(one._gradients)
    assert isinstance(one.regulariser, ChildNetwork)
    assert set(one.regulariser.masks) == set(fisher)
    agree = torch.cat([(one.regulariser.masks[name] == (fisher[name] >= floor)).flatten() for name in fisher])
    assert agree.double().mean() > 0.9999, "float32 may swap two that are nearly equal"
    kept = torch.cat([mask.flatten() for mask in one.regulariser.masks.values()]).double().mean()
    assert kept == pytest.approx(0.2, abs=1e-3)
    assert all(parameter.grad is None for parameter in one.parameters.values())


def test_neither_gradient_nor_decay_moves_what_is_outside_the_child(bert: Encoder):
    one = child(bert, "d", weight_decay=0.5, epochs=2)
    before = parameters(one)
    one.run()
    masks = one.regulariser.masks  # type: ignore[attr-defined]
    for name, mask in masks.items():
        assert torch.equal(one.parameters[name].detach()[~mask], before[name][~mask]), name
    weight = f"{LAYER}1.intermediate.dense.weight"
    inside = masks[weight]
    assert (one.parameters[weight].detach()[inside] != before[weight][inside]).all()
    words = "model.embeddings.word_embeddings.weight"
    assert words not in masks
    assert not torch.equal(one.parameters[words].detach(), before[words])


def test_plain_full_fine_tuning_moves_everything(bert: Encoder):
    """The check above can fail."""
    one = trainer(bert, method="full", weight_decay=0.5, epochs=2, learning_rate=1e-2)
    before = parameters(one)
    one.run()
    weight = f"{LAYER}1.intermediate.dense.weight"
    assert (one.parameters[weight].detach() != before[weight]).all()


@pytest.mark.parametrize("mode", ["d", "f"])
def test_a_step_is_adamw_s_inside_the_mask(bert: Encoder, mode: str):
    """Against AdamW written out: masked gradient, decay times the mask."""
    one = child(bert, mode, 0.4, weight_decay=0.1)
    one.live.eval()
    one.regulariser.begin(one._gradients)
    set_rate(one.optimizer, 1.0)
    one.gradient(one.items)
    before = parameters(one)
    gradients = {
        name: parameter.grad.clone() for name, parameter in one.parameters.items() if parameter.grad is not None
    }
    torch.manual_seed(5)
    one.regulariser.step(one.optimizer)
    torch.manual_seed(5)
    drawn = {name: torch.empty_like(p).bernoulli_(0.4) for name, p in one.parameters.items()}
    spared = one.live.no_decay()
    for name, gradient in gradients.items():
        if mode == "f":
            mask, gradient = drawn[name], gradient * drawn[name] / 0.4
        else:
            mask = one.regulariser.masks.get(name, torch.ones(())).float()  # type: ignore[attr-defined]
            gradient = gradient * mask
        decay = 0.0 if name in spared else 0.1
        group_rate = one.config.head_rate if name.startswith("head.") else 1e-2
        expected = before[name] * (1 - group_rate * decay * mask)
        expected -= group_rate * gradient / (gradient.abs() + 1e-8)  # Adam's first step: both moments corrected
        assert torch.allclose(one.parameters[name].detach(), expected, atol=2e-6), name
    assert {group["weight_decay"] for group in one.optimizer.param_groups} == {0.0, 0.1}


def test_f_draws_another_child_each_step(bert: Encoder):
    one = child(bert, "f", 0.25)
    one.live.eval()
    one.regulariser.begin(one._gradients)
    assert one.regulariser.tensors() == {}
    drawn = []
    for _ in range(2):
        one.gradient(one.items)
        weight = one.parameters[f"{LAYER}0.intermediate.dense.weight"]
        full = weight.grad.clone()
        one.regulariser.step(one.optimizer)
        drawn.append(weight.grad != 0)
        assert torch.allclose(weight.grad[drawn[-1]], full[drawn[-1]] / 0.25)
        assert drawn[-1].float().mean() == pytest.approx(0.25, abs=0.05)
        one.optimizer.zero_grad()
    assert not torch.equal(*drawn)


def test_largest_counts_over_all_tensors_and_never_zeros():
    values = {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([[1.0], [2.0]])}
    assert {name: mask.tolist() for name, mask in largest(values, 0.5).items()} == {
        "a": [False, True],
        "b": [[False], [True]],
    }
    assert largest(values, 1.0)["a"].tolist() == [False, True]
