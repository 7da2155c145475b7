"""BERT's layers as modules of our own, by the names of the checkpoints: for a process that should start fast.

transformers' modelling code brings 1,500 modules (torch._dynamo, torch.distributed, sympy, scipy), some two seconds
and 100 MB of them, for what a server never does. The arithmetic is that of transformers' ``BertModel`` and
``RobertaModel``, operation by operation: the same rows to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.families.compat import NAME, activation, attend_packed, attention_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LayersOutput:
    """What transformers' models give: [B, R, H], and where they were asked for those after the embeddings and each
    layer."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None


class UndrawnLinear(nn.Linear):
    """One whose weights are loaded, not drawn: drawing, and all else on the meta device, may import torch._dynamo."""

    def reset_parameters(self) -> None:
        """Leaves them as they are."""


class UndrawnEmbedding(nn.Embedding):
    """The same of word vectors."""

    def reset_parameters(self) -> None:
        """Leaves them as they are."""


class BertLayers(nn.Module):
    """A headless BERT, or RoBERTa with ``first_position`` behind the padding's row. Weights are still to be loaded.

    ``dense_attention`` names the attention that it came with, as ``compat`` has it.
    """

    _supports_attention_backend = True
    pooler: None = None
    dense_attention: str | None = None

    def __init__(self, config: PretrainedConfig, base_model_prefix: str, padded_positions: bool = False) -> None:
        super().__init__()
        self.config, self.base_model_prefix = config, base_model_prefix
        self.embeddings = _Embeddings(config, config.pad_token_id if padded_positions else None)
        self.encoder = _LayerStack(config)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> LayersOutput:
        """ids [B, R] or word vectors [B, R, H], and mask [B, R], 1 for rows that are seen, to hidden states."""
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.embeddings(words, token_type_ids, position_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        states = [hidden]
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
            if output_hidden_states:
                states.append(hidden)
        return LayersOutput(hidden, tuple(states) if output_hidden_states else None)


class _Embeddings(nn.Module):
    def __init__(self, config: PretrainedConfig, padding: int | None) -> None:
        super().__init__()
        self.word_embeddings = UndrawnEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = UndrawnEmbedding(config.max_position_embeddings, config.hidden_size, padding)
        self.token_type_embeddings = UndrawnEmbedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.first_position = 0 if padding is None else padding + 1

    def forward(self, words: Tensor, types: Tensor | None, positions: Tensor | None) -> Tensor:
        if positions is None:
            positions = torch.arange(words.shape[1], device=words.device)[None] + self.first_position
        if types is None:
            types = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        summed = words + self.token_type_embeddings(types) + self.position_embeddings(positions)
        out: Tensor = self.dropout(self.LayerNorm(summed))
        return out


class _LayerStack(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.attention = _AttentionBlock(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        out: Tensor = self.output(self.intermediate(x), x)
        return out


class _AttentionBlock(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.self = _Attention(config)
        self.output = _Output(config, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.output(self.self(x, mask), x)
        return out


class _Intermediate(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.dense = UndrawnLinear(config.hidden_size, config.intermediate_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.dense(x))
        return out


class _Output(nn.Module):
    def __init__(self, config: PretrainedConfig, inputs: int) -> None:
        super().__init__()
        self.dense = UndrawnLinear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, rows: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(rows)) + residual)
        return out


class _Attention(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.hidden_size // config.num_attention_heads
        self.query, self.key, self.value = (UndrawnLinear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, R, H]."""
        parts = (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.view(*x.shape[:-1], -1, self.width).transpose(1, 2) for part in parts)
        scaling, dropout = self.width**-0.5, self.dropout if self.training else 0.0
        if attention_of(self.config) == NAME:
            seen, _ = attend_packed(self, query, key, value, None, scaling, dropout)
        else:
            seen = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling).transpose(1, 2)
        return seen.reshape(x.shape)
