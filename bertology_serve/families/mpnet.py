"""MPNet: T5-like biases for the distance of two rows, shared by all layers.

Its attention ignores transformers' interface, so packed rows go through a forward of our own on the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertology_serve.families.compat import mpnet_buckets, nothing, patch
from bertology_serve.families.family import Current, Family, classifier, dense_out_proj, pooler, roberta_words, spans

if TYPE_CHECKING:
    from bertology_serve.families.compat import MPNetEncoder, MPNetSelfAttention


def connect(model: Any, modules: Sequence[Any], current: Current) -> None:
    """Gives every attention module the shared biases and stops the encoder from making a [T, T] table of them."""
    patch(model.encoder, "compute_position_bias", nothing)
    for layer, module in enumerate(modules):
        patch(module, "forward", partial(_attend, module, model.encoder, layer, current))


def _attend(
    module: MPNetSelfAttention, encoder: MPNetEncoder, layer: int, current: Current, hidden_states: Tensor, *_: object,
    **__: object,
) -> tuple[Tensor]:  # fmt: skip
    """MPNetSelfAttention.forward: hidden_states [1, T, H] -> ([1, T, H],)."""
    assert current.value is not None
    shape = (hidden_states.shape[1], module.num_attention_heads, module.attention_head_size)
    query, key, value = (projection(hidden_states)[0].view(shape) for projection in (module.q, module.k, module.v))
    out = current.value.attention(
        layer,
        query,
        key,
        value,
        scale=module.attention_head_size**-0.5,
        bias=lambda _, q, __: _bias(encoder, q.shape[2]).to(q.dtype),
        dropout=module.dropout.p if module.training else 0.0,
    )
    return (module.o(out[None]),)


def _bias(encoder: MPNetEncoder, length: int) -> Tensor:
    """[1, heads, length, length] for sequences of that length."""
    at = torch.arange(length, device=encoder.relative_attention_bias.weight.device)
    buckets = mpnet_buckets(at[None, :] - at[:, None])
    bias: Tensor = encoder.relative_attention_bias(buckets)
    return bias.permute(2, 0, 1).unsqueeze(0)


MPNET = Family(
    "mpnet",
    dense_out_proj("tanh"),
    pooler,
    classifier,
    spans,
    roberta_words,
    connect=connect,
    positions="bias",
    emitted=True,
)
