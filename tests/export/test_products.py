from __future__ import annotations

import torch
from torch import nn

from bertology_serve.export.torch_exporter import Product, as_products


def test_linears_are_turned_round_and_keep_their_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 2, bias=False), nn.LayerNorm(2)))
    x = torch.randn(4, 7, 3)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    as_products(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model[0], Product)
    assert model[1][0].weight.shape == (5, 2)
    assert torch.allclose(model(x), before, atol=1e-6)
