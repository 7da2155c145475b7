"""A fresh HuggingFace encoder on given weights: nothing of the torch engine is in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bertology_serve.encoder.pruned import shrink


def plain_model(kind: type[Any], config: Any, state: Mapping[str, Tensor], attention: str) -> Any:
    """A headless HuggingFace model of class ``kind``, float32, on CPU, not training.

    ``state`` is a state dict of that model; biases that the class does not have are added to the linears and norms
    that it names. ``attention`` is a name that transformers' attention interface knows (``eager``, ``sdpa``).
    """
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    model.pooler = None
    shrink(model, state)
    for name in state.keys() - model.state_dict().keys():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "bias" and isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
    model.load_state_dict(dict(state))
    return model.float().eval().requires_grad_(False)
