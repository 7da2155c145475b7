from __future__ import annotations

import torch

from bertology_serve.encoder.linear import SlotLinear, SlotNorm
from bertology_serve.export.hf_model import hf_model
from tests import tiny


def test_nothing_of_the_engine_is_in_it_and_the_random_state_is_left_alone(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    state, attention = torch.random.get_rng_state(), encoder.config._attn_implementation
    model = hf_model(type(encoder.model), encoder.config, encoder.model.state_dict(), "sdpa")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert encoder.config._attn_implementation == attention
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(module, SlotLinear | SlotNorm) for module in model.modules())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    own = {id(parameter) for parameter in encoder.model.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in model.parameters())
