"""MPNet's self-attention on packed rows: T5-like relative biases, shared by all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bertology_serve.encoder.attention import Group, packed_attention


def prepare(model: Any) -> None:
    """Gives every attention module the shared bias table and stops the encoder from making a [T, T] one."""
    encoder = model.encoder
    encoder.compute_position_bias = lambda *_, **__: None
    for layer in encoder.layer:
        layer.attention.attn.shared = [encoder]  # in a list: not to be registered as a submodule


def attend(self: Any, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, **_: Any) -> Any:
    """MPNetSelfAttention.forward: hidden_states [1, T, H] -> ([1, T, H],)."""
    now = self.current.it
    shape = (hidden_states.shape[1], self.num_attention_heads, self.attention_head_size)
    query, key, value = (projection(hidden_states)[0].view(shape) for projection in (self.q, self.k, self.v))
    out = packed_attention(
        query,
        key,
        value,
        now.layout,
        scale=self.attention_head_size**-0.5,
        prefix=now.prefix(self.layer_number),
        bias=lambda group, q, _: _bias(self.shared[0], group).to(q.dtype),
        dropout=self.dropout.p if self.training else 0.0,
        attend=now.attend(self.layer_number),
    )
    return (self.o(out[None]),)


def _bias(encoder: Any, group: Group) -> Tensor:
    """[1, heads, length, length] for sequences of that length."""
    at = torch.arange(group.length, device=encoder.relative_attention_bias.weight.device)
    buckets = encoder.relative_position_bucket(at[None, :] - at[:, None])
    bias: Tensor = encoder.relative_attention_bias(buckets)
    return bias.permute(2, 0, 1).unsqueeze(0)
