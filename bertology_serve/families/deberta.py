"""DeBERTa-v2/v3's disentangled self-attention on packed rows (He et al. 2021, arXiv 2006.03654).

Content-to-position and position-to-content scores need the projections of the relative-position embeddings. Those
rows belong to no sequence, so a delta that changes query, key or the position projections changes them for its own
sequences: they are computed once for the base and once more for each such delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertology_serve.families.compat import activation, deberta_distances, nothing, patch
from bertology_serve.families.family import Current, Family, FamilyContext, bert_words, classifier, hidden_first, spans

if TYPE_CHECKING:
    from bertology_serve.families.compat import ConvLayer, DebertaAttention, DebertaV2Encoder

_POSITION_SLOTS = ("query", "key", "position_key", "position_query", "relative_norm")


def connect(model: Any, modules: Sequence[Any], current: Current) -> None:
    """Stops the encoder from making [T, T] masks and positions; the convolution, if any, goes sequence by sequence."""
    encoder = model.encoder
    patch(encoder, "get_attention_mask", lambda mask: mask)
    patch(encoder, "get_rel_pos", nothing)
    for layer, module in enumerate(modules):
        patch(module, "forward", partial(_attend, module, encoder, layer, current))
    if encoder.conv is not None:
        patch(encoder.conv, "forward", partial(_convolve, encoder.conv, current))


def _attend(
    module: DebertaAttention, encoder: DebertaV2Encoder, layer: int, current: Current, hidden_states: Tensor,
    *_: object, **__: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """DisentangledSelfAttention.forward: hidden_states [1, T, H] -> ([1, T, H], None)."""
    assert current.value is not None
    heads = module.num_attention_heads
    projections = (module.query_proj, module.key_proj, module.value_proj)
    query, key, value = (p(hidden_states)[0].view(hidden_states.shape[1], heads, -1) for p in projections)
    factor = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    scale = (query.shape[-1] * factor) ** -0.5
    positions = _Positions(module, encoder, layer, current.value) if module.relative_attention else None
    out = current.value.attention(
        layer,
        query,
        key,
        value,
        scale=scale,
        bias=None if positions is None else lambda sequences, q, k: positions.bias(sequences, q, k) * scale,
        dropout=module.dropout.p if module.training else 0.0,
    )
    return out[None], None


class _Positions:
    """The projected relative-position embeddings of one layer, for the base and for every delta that changes them."""

    def __init__(self, module: DebertaAttention, encoder: DebertaV2Encoder, layer: int, now: FamilyContext) -> None:
        self.module, self.encoder, self.layer, self.now = module, encoder, layer, now
        self.span = module.pos_ebd_size
        deltas, self.owner = now.changing(_POSITION_SLOTS)
        tables = [self._project(delta) for delta in (None, *deltas)]
        keys, queries = ([rows for rows in side if rows is not None] for side in zip(*tables, strict=True))
        self.key = torch.stack(keys) if keys else None
        self.query = torch.stack(queries) if queries else None

    def bias(self, sequences: Sequence[int], query: Tensor, key: Tensor) -> Tensor:
        """[count, heads, length, length], not yet scaled, for sequences of one length."""
        owners = [self.owner[i] for i in sequences]
        module, shape = self.module, (*query.shape[:3], query.shape[2])
        distance = deberta_distances(query, key, module.position_buckets, module.max_relative_positions)
        total = query.new_zeros(shape)
        if self.key is not None:
            scores = query @ self.key[owners].transpose(-1, -2)
            index = torch.clamp(distance + self.span, 0, 2 * self.span - 1)
            total = total + scores.gather(-1, index.expand(shape))
        if self.query is not None:
            scores = key @ self.query[owners].transpose(-1, -2)
            index = torch.clamp(-distance + self.span, 0, 2 * self.span - 1)
            total = total + scores.gather(-1, index.expand(shape)).transpose(-1, -2)
        return total

    def _project(self, delta: str | None) -> tuple[Tensor | None, Tensor | None]:
        """(position keys, position queries), each [heads, 2 span, D] or ``None``, as one delta sees them."""
        module = self.module
        rows = module.pos_dropout(self._embeddings(delta)[: 2 * self.span])
        shared = module.share_att_key
        key = query = None
        if shared or "c2p" in module.pos_att_type:
            key = self._linear(delta, rows, "key" if shared else "position_key", "key_proj", "pos_key_proj")
        if shared or "p2c" in module.pos_att_type:
            query = self._linear(delta, rows, "query" if shared else "position_query", "query_proj", "pos_query_proj")
        return (
            key if "c2p" in module.pos_att_type else None,
            query if "p2c" in module.pos_att_type else None,
        )

    def _embeddings(self, delta: str | None) -> Tensor:
        """[2 span, H]: the relative-position embeddings, normed where the checkpoint does so."""
        encoder = self.encoder
        rows: Tensor = encoder.rel_embeddings.weight
        if "layer_norm" in encoder.norm_rel_ebd:
            norm = encoder.LayerNorm
            rows = F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            rows = self._delta(delta, "relative_norm", 0, None, rows)
        return rows

    def _linear(self, delta: str | None, rows: Tensor, slot: str, shared: str, own: str) -> Tensor:
        linear: nn.Linear = getattr(self.module, shared if self.module.share_att_key else own)
        out = F.linear(rows, linear.weight, linear.bias)
        out = self._delta(delta, slot, self.layer, rows, out)
        return out.view(rows.shape[0], self.module.num_attention_heads, -1).transpose(0, 1)

    def _delta(self, delta: str | None, slot: str, layer: int, x: Tensor | None, y: Tensor) -> Tensor:
        """y with what one delta does to a slot, for rows that belong to no sequence."""
        return y if delta is None else self.now.alone(delta, slot, layer, x, y)


def _convolve(module: ConvLayer, current: Current, hidden_states: Tensor, residual_states: Tensor, _: object) -> Tensor:
    """ConvLayer.forward on packed rows: each sequence is convolved on its own, zeros around it."""
    assert current.value is not None
    extents = current.value.extents
    padded = nn.utils.rnn.pad_sequence([hidden_states[0, at : at + length] for at, length in extents], batch_first=True)
    out = module.conv(padded.transpose(1, 2)).transpose(1, 2)
    flat = torch.cat([out[i, :length] for i, (_, length) in enumerate(extents)])
    flat = current.value.outside("conv", flat)
    normed: Tensor = module.LayerNorm(residual_states + activation(module.conv_act)(module.dropout(flat))[None])
    return normed


_pooled = hidden_first("pooler.dense", "gelu", "pooler_hidden_act")
DEBERTA = Family("deberta", _pooled, None, classifier, spans)
DEBERTA_V2 = Family(
    "deberta-v2", _pooled, _pooled, classifier, spans, bert_words,
    connect=connect, positions="disentangled", emitted=True,
)  # fmt: skip
