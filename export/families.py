"""What single families need before they are exported: MPNet's and DeBERTa's attention, ModernBERT's order.

Relative distances are turned into buckets by logarithms, which round differently in other runtimes: a table made here,
by HuggingFace's own functions, holds the bucket of every distance that can occur.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.export.attention import attend


def prepare(model: Any, anatomy: Anatomy, rows: int) -> bool:
    """Makes a fresh model ready to be traced; ``rows`` is the longest sequence, prompt included.

    Says whether its attention modules got a forward of their own here.
    """
    own = {"mpnet": _prepare_mpnet, "deberta-v2": _prepare_deberta}.get(anatomy.family)
    if own is not None:
        own(model, rows)
    elif anatomy.family == "modernbert":
        _prepare_modernbert(model)
    return own is not None


class Distances(nn.Module):
    """``table`` [2 M - 1] holds what stands for the distance ``i - j`` between two of M rows at ``i - j + M - 1``."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, rows: int) -> Tensor:
        """[rows, rows]: the entry for row i (first) and row j."""
        at = torch.arange(rows)
        return self.table[at[:, None] - at[None, :] + self.table.shape[0] // 2]


def _distances(rows: int) -> Tensor:
    return torch.arange(1 - rows, rows)


def _prepare_mpnet(model: Any, rows: int) -> None:
    encoder = model.encoder
    encoder.compute_position_bias = lambda *_, **__: None
    encoder.distances = Distances(encoder.relative_position_bucket(-_distances(rows)))
    for layer in encoder.layer:
        module = layer.attention.attn
        module.shared = [encoder]  # in a list: not to be registered as a submodule
        module.forward = MethodType(_attend_mpnet, module)


def _attend_mpnet(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    """MPNetSelfAttention.forward: [B, R, H] -> ([B, R, H],)."""
    encoder = self.shared[0]
    query, key, value = (_by_head(p(hidden_states), self.num_attention_heads) for p in (self.q, self.k, self.v))
    bias = encoder.relative_attention_bias(encoder.distances(hidden_states.shape[1])).permute(2, 0, 1)[None]
    scale = self.attention_head_size**-0.5
    out = attend(query, key, value, self.scene, self.prefix_rows, scale=scale, bias=bias)
    return (self.o(out.flatten(2)),)


def _prepare_deberta(model: Any, rows: int) -> None:
    encoder = model.encoder
    encoder.get_attention_mask = lambda mask: mask
    encoder.get_rel_pos = lambda *_, **__: None
    if encoder.relative_attention:
        distances, buckets = _distances(rows), encoder.position_buckets
        if buckets > 0 and encoder.max_relative_positions > 0:
            distances = make_log_bucket_position(distances, buckets, encoder.max_relative_positions)
        encoder.distances = Distances(distances.long())
    for layer in encoder.layer:
        module = layer.attention.self
        module.shared = [encoder]
        module.forward = MethodType(_attend_deberta, module)


def _attend_deberta(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """DisentangledSelfAttention.forward: [B, R, H] -> ([B, R, H], None)."""
    projections = (self.query_proj, self.key_proj, self.value_proj)
    query, key, value = (_by_head(p(hidden_states), self.num_attention_heads) for p in projections)
    factor = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
    scale = float(query.shape[-1] * factor) ** -0.5
    bias = _disentangled(self, query, key) * scale if self.relative_attention and factor > 1 else None
    out = attend(query, key, value, self.scene, self.prefix_rows, scale=scale, bias=bias)
    return out.flatten(2), None


def _disentangled(self: Any, query: Tensor, key: Tensor) -> Tensor:
    """Content-to-position and position-to-content scores [B, heads, R, R], not yet scaled (He et al. 2021)."""
    encoder, span, heads = self.shared[0], self.pos_ebd_size, self.num_attention_heads
    rows: Tensor = encoder.get_rel_embedding()[None, : 2 * span]
    distance = encoder.distances(query.shape[2])
    shape = (query.shape[0], heads, query.shape[2], query.shape[2])
    terms = []
    if "c2p" in self.pos_att_type:
        keys = _by_head((self.key_proj if self.share_att_key else self.pos_key_proj)(rows), heads)
        index = torch.clamp(distance + span, 0, 2 * span - 1)
        terms.append((query @ keys.transpose(-1, -2)).gather(-1, index.expand(shape)))
    if "p2c" in self.pos_att_type:
        queries = _by_head((self.query_proj if self.share_att_key else self.pos_query_proj)(rows), heads)
        index = torch.clamp(-distance + span, 0, 2 * span - 1)
        terms.append((key @ queries.transpose(-1, -2)).gather(-1, index.expand(shape)).transpose(-1, -2))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """[B, R, H] -> [B, heads, R, D]."""
    return rows.view(*rows.shape[:-1], heads, -1).transpose(1, 2)


def _prepare_modernbert(model: Any) -> None:
    """Rotations of global and local layers are made in a fixed order: the model walks a set of strings, whose order
    changes from process to process, and the exported bytes with it."""
    rotate, kinds = model.rotary_emb.forward, sorted(set(model.config.layer_types))
    made: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(x: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        if kind not in made:
            made.update({other: rotate(x, positions, other) for other in kinds})
        return made.pop(kind)

    model.rotary_emb.forward = forward
