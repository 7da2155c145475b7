from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.regularisers import MixedWeights
from bertology_serve.training.trainer import Trainer
from tests.training.live import trainer

UP = "model.encoder.layer.0.intermediate.dense"


def naive(weight: Tensor, start: Tensor, mask: Tensor, p: float) -> Tensor:
    """The paper's equation 6 to the letter."""
    return (mask * weight + (1 - mask) * start - p * start) / (1 - p)


def moved(encoder: Encoder, p: float, **values: Any) -> Trainer:
    """A run whose weights have left their pretrained values."""
    one = trainer(encoder, method="mixout", start="random", options={"mixout": {"p": p}}, **values)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in one.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one.live.train()
    return one


def test_expectation_is_the_weight_and_variance_is_bernoulli_s(bert: Encoder):
    """E = W and Var = (W - W₀)² p / (1 - p), each within five standard errors of 4,000 draws."""
    p, draws = 0.7, 4000
    one = moved(bert, p)
    assert isinstance(one.regulariser, MixedWeights)
    weight = one.parameters[f"{UP}.weight"]
    start = next(start for parameter, start in one.regulariser.starts if parameter is weight)
    own, total, squares = weight.detach().clone(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    one.regulariser.starts = [(weight, start)]
    for _ in range(draws):
        with one.regulariser.mixed():
            difference = (weight.detach() - own).double()
            total += difference
            squares += difference.square()
    variance = (own - start).double().square() * p / (1 - p)
    assert ((total / draws).abs() <= 5 * (variance / draws).sqrt() + 1e-6).all()
    assert (squares / draws).sum().item() == pytest.approx(variance.sum().item(), rel=0.02)
    assert torch.equal(weight.detach(), own), "the weight itself stays"


def test_mixture_and_gradient_are_the_equation_s(bert: Encoder):
    """Autograd through the paper's equation, with the mask found from the mixture, gives the same gradient."""
    p = 0.6
    one = moved(bert, p)
    weights = {name: parameter.detach().clone() for name, parameter in one.parameters.items()}
    starts = {id(parameter): start for parameter, start in one.regulariser.starts}
    mixtures = {}
    with one.regulariser.mixed():
        loss = one.gradient(one.items)
        mixtures = {name: parameter.detach().clone() for name, parameter in one.parameters.items()}
    gradients = {
        name: parameter.grad.clone() for name, parameter in one.parameters.items() if parameter.grad is not None
    }
    leaves = {}
    for name, parameter in one.parameters.items():
        leaf = weights[name].requires_grad_(True)
        leaves[name] = leaf
        start = starts.get(id(parameter))
        if start is None:
            assert torch.equal(mixtures[name], weights[name].detach()), f"{name} is mixed"
            continue
        mask = ((mixtures[name] - start).abs() > (weights[name].detach() - start).abs()).float()
        mixed = naive(leaf, start, mask, p)
        assert torch.allclose(mixed, mixtures[name], atol=1e-5)
        assert 0.3 < mask.mean() < 0.5 or mask.numel() < 500
        leaves[name] = (leaf, mixed)
    out = swapped(one, {name: pair[1] if isinstance(pair, tuple) else pair for name, pair in leaves.items()})
    out.backward()
    assert out.item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        leaf = leaves[name][0] if isinstance(leaves[name], tuple) else leaves[name]
        assert torch.allclose(leaf.grad, gradient, rtol=1e-3, atol=1e-6), name


def swapped(one: Trainer, tensors: dict[str, Tensor]) -> Tensor:
    """The mean loss with other tensors in the place of the parameters."""
    out = torch.func.functional_call(
        one.live, tensors, ([encoding for item in one.items for encoding in item.encodings],)
    )
    return F.cross_entropy(out, torch.tensor([item.target for item in one.items]))


def test_every_linear_and_the_pooler_are_mixed_and_nothing_else(bert: Encoder):
    one = moved(bert, 0.5)
    mixed = {id(parameter) for parameter, _ in one.regulariser.starts}
    names = {name for name, parameter in one.parameters.items() if id(parameter) in mixed}
    linears = {name for name, module in one.live.named_modules() if isinstance(module, nn.Linear)}
    expected = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    outer = {f"head.layers.1.linear.{part}" for part in ("weight", "bias")}
    assert outer < expected, "the classifier has no pretrained value"
    assert names == expected - outer
    assert not any("LayerNorm" in name or "embeddings" in name for name in names)


def test_one_mask_for_all_micro_batches_of_a_step(bert: Encoder):
    gradients = []
    for max_tokens in (10_000, 1):
        one = moved(Encoder.load(bert.name), 0.5, max_tokens=max_tokens)
        torch.manual_seed(3)
        with one.regulariser.mixed():
            one.gradient(one.items)
        gradients.append(one.parameters[f"{UP}.weight"].grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())
    assert gradients[0].norm() > 1e-3


def test_dropout_is_off_and_evaluation_uses_the_weights(bert: Encoder):
    one = trainer(bert, method="mixout", options={"mixout": {"p": 0.5}}, epochs=1)
    one.live.train()
    assert not bert.model.training
    with torch.no_grad():
        first, second = (one.live(one.items[0].encodings) for _ in range(2))
    assert torch.equal(first, second), "the head's dropout is off"


def test_p_of_nothing_is_plain_fine_tuning(bert_path):
    ends = []
    for values in ({"method": "mixout", "options": {"mixout": {"p": 0.0}}}, {"method": "full"}):
        steps = {"max_steps": 3, "learning_rate": 1e-3, "epsilon": 1e-4}  # AdamW makes no whole step of noise
        one = trainer(Encoder.load(str(bert_path)), **values, **steps, trunk_dropout=False)
        for module in one.live.head.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        one.run()
        ends.append(one.parameters[f"{UP}.weight"].detach())
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-5)


def test_an_interrupt_leaves_the_weights(bert: Encoder):
    one = moved(bert, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in one.parameters.items()}
    with pytest.raises(KeyboardInterrupt), one.regulariser.mixed():
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], parameter) for name, parameter in one.parameters.items())
