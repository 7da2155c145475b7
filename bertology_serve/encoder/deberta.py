"""DeBERTa-v2/v3's disentangled self-attention on packed rows (He et al. 2021, arXiv 2006.03654).

Content-to-position and position-to-content scores need the projections of the relative-position embeddings. Those
rows belong to no sequence, so a delta that changes query, key or the position projections changes them for its own
sequences: they are computed once for the base and once more for each such delta.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from bertology_serve.encoder.attention import Group, packed_attention
from bertology_serve.encoder.bank import Entry
from bertology_serve.encoder.forward_context import CurrentContext, ForwardContext, Place
from bertology_serve.kernels.segments import RowSegment

_POSITION_SLOTS = ("query", "key", "position_key", "position_query", "relative_norm")


def prepare(model: Any, current: CurrentContext) -> None:
    """Stops the encoder from making [T, T] masks and positions; the convolution, if any, goes sequence by sequence."""
    encoder = model.encoder
    encoder.get_attention_mask = lambda mask: mask
    encoder.get_rel_pos = lambda *_, **__: None
    for layer in encoder.layer:
        layer.attention.self.shared = [encoder]  # in a list: not to be registered as a submodule
    if encoder.conv is not None:
        encoder.conv.current = current
        encoder.conv.forward = MethodType(_convolve, encoder.conv)


def attend(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """DisentangledSelfAttention.forward: hidden_states [1, T, H] -> ([1, T, H], None)."""
    now: ForwardContext = self.current.it
    heads = self.num_attention_heads
    projections = (self.query_proj, self.key_proj, self.value_proj)
    query, key, value = (p(hidden_states)[0].view(hidden_states.shape[1], heads, -1) for p in projections)
    factor = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
    scale = (query.shape[-1] * factor) ** -0.5
    positions = _Positions(self, now) if self.relative_attention else None
    out = packed_attention(
        query,
        key,
        value,
        now.layout,  # type: ignore[arg-type]
        scale=scale,
        prefix=now.prefix(self.layer_number),
        bias=None if positions is None else lambda group, q, k: positions.bias(group, q, k) * scale,
        dropout=self.dropout.p if self.training else 0.0,
        attend=now.attend(self.layer_number),
    )
    return out[None], None


class _Positions:
    """The projected relative-position embeddings of one layer, for the base and for every delta that changes them."""

    def __init__(self, module: Any, now: ForwardContext) -> None:
        self.module, self.now = module, now
        self.span = module.pos_ebd_size
        deltas = {e.key: e for e in now.batch.entries if any(slot in e.rows for slot in _POSITION_SLOTS)}
        self.row = {key: i + 1 for i, key in enumerate(deltas)}
        tables = [self._project(entry) for entry in (None, *deltas.values())]
        self.key = torch.stack([table[0] for table in tables]) if tables[0][0] is not None else None
        self.query = torch.stack([table[1] for table in tables]) if tables[0][1] is not None else None

    def bias(self, group: Group, query: Tensor, key: Tensor) -> Tensor:
        """[count, heads, length, length], not yet scaled."""
        owners = [self.row.get(self.now.batch.entries[i].key, 0) for i in group.sequences]
        distance = build_relative_position(
            query, key, bucket_size=self.module.position_buckets, max_position=self.module.max_relative_positions
        ).to(query.device)
        shape = (group.count, query.shape[1], group.length, group.length)
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

    def _project(self, entry: Entry | None) -> tuple[Any, Any]:
        """(position keys, position queries), each [heads, 2 span, D] or ``None``, as one delta sees them."""
        module = self.module
        rows = module.pos_dropout(self._embeddings(entry)[: 2 * self.span])
        shared = module.share_att_key
        key = query = None
        if shared or "c2p" in module.pos_att_type:
            key = self._linear(entry, rows, "key" if shared else "position_key", "key_proj", "pos_key_proj")
        if shared or "p2c" in module.pos_att_type:
            query = self._linear(entry, rows, "query" if shared else "position_query", "query_proj", "pos_query_proj")
        return (
            key if "c2p" in module.pos_att_type else None,
            query if "p2c" in module.pos_att_type else None,
        )

    def _embeddings(self, entry: Entry | None) -> Tensor:
        """[2 span, H]: the relative-position embeddings, normed where the checkpoint does so."""
        encoder = self.module.shared[0]
        rows: Tensor = encoder.rel_embeddings.weight
        if "layer_norm" in encoder.norm_rel_ebd:
            norm = encoder.LayerNorm
            rows = F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            rows = self._delta(entry, "relative_norm", 0, None, rows)
        return rows

    def _linear(self, entry: Entry | None, rows: Tensor, slot: str, shared: str, own: str) -> Tensor:
        linear: nn.Linear = getattr(self.module, shared if self.module.share_att_key else own)
        out = F.linear(rows, linear.weight, linear.bias)
        out = self._delta(entry, slot, self.module.layer_number, rows, out)
        return out.view(rows.shape[0], self.module.num_attention_heads, -1).transpose(0, 1)

    def _delta(self, entry: Entry | None, slot: str, layer: int, x: Tensor | None, y: Tensor) -> Tensor:
        """y with what one delta does to a slot, for rows that belong to no sequence."""
        if entry is None or slot not in entry.rows:
            return y
        template = entry.rows[slot]
        whole = RowSegment(0, y.shape[0], template.first, template.last, template.bias, template.dropout)
        return self.now.update(Place(slot, layer), x, y.clone(), [whole])


def _convolve(self: Any, hidden_states: Tensor, residual_states: Tensor, input_mask: Any) -> Tensor:
    """ConvLayer.forward on packed rows: each sequence is convolved on its own, zeros around it."""
    now: ForwardContext = self.current.it
    batch = now.batch
    rows = [hidden_states[0, start : start + length] for start, length in zip(batch.starts, batch.lengths, strict=True)]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    out = self.conv(padded.transpose(1, 2)).transpose(1, 2)
    flat = torch.cat([out[i, :length] for i, length in enumerate(batch.lengths)])
    flat = now.update(Place("conv", 0), None, flat)
    normed: Tensor = self.LayerNorm(residual_states + ACT2FN[self.conv_act](self.dropout(flat))[None])
    return normed
