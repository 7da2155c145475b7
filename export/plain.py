"""A fresh HuggingFace model on given weights: nothing of the torch engine is in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bertology_serve.encoder.pruned import shrink
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.parts import Parts


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


def task_model(parts: Parts, name: str, attention: str) -> Any:
    """HuggingFace's task model of class ``name`` on the weights and the head of ``parts``, whose delta is merged.

    float32, on CPU, not training. Raises Unsupported where ``parts`` have a tensor that the class has no place for, and
    VerificationError where the class has one that they lack: what it adds to an answer would be missing.
    """
    import transformers

    config = copy.deepcopy(parts.config)
    config.num_labels, config._attn_implementation = parts.task.outputs, attention
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, name)(config)
    head: dict[str, Tensor] = {name: tensor.detach() for name, _, tensor in parts.head.named()}
    state = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in parts.state.items()} | head
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise Unsupported(f"{name} has no place for {unexpected[0]}; give another delta")
    if missing:
        raise VerificationError(
            f"transformers' {name} also has {missing[0]}, which the delta is answered without here; nothing was "
            "published: report it"
        )
    return model.float().eval().requires_grad_(False)
