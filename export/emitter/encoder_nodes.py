"""Encoders as their papers write them: embeddings, then layers with the norm behind each block or before it."""

from __future__ import annotations

from functools import partial

from bertology_serve.export.emitter.attention_nodes import Attention
from bertology_serve.export.emitter.module_nodes import Modules
from bertology_serve.export.emitter.nodes import ACTIVATION_NODES, Value
from bertology_serve.export.emitter.row_nodes import Rows
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.kinds.slots import (
    ATTENTION_NORM,
    DOWN,
    EMBEDDING_NORM,
    FFN_NORM,
    FINAL_NORM,
    KEY,
    OUTPUT,
    QKV,
    QUERY,
    UP,
    UP_GATE,
    VALUE,
)

PROJECTION = "embedding_projection"
WORDS = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight")
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


def activation_of(parts: ExportInputs) -> str:
    """The name of the activation between up and down."""
    names = ("hidden_activation", "hidden_act", "activation")
    return next(str(getattr(parts.config, name)) for name in names if hasattr(parts.config, name))


def encode(modules: Modules, rows: Rows, attend: Attention | None = None) -> Value:
    """The last hidden states [T, H]."""
    attend, layer_of = attend or Attention(modules, rows), pre_norm if modules.parts.anatomy.pre_norm else post_norm
    x = embed(modules, rows)
    for layer in range(modules.parts.anatomy.layers):
        x = layer_of(modules, attend, layer, x)
    return modules.norm(FINAL_NORM, 0, x) if modules.has(FINAL_NORM) else x


def embed(modules: Modules, rows: Rows) -> Value:
    """Words or prompt vectors, plus positions and types, normed; [T, H]."""
    table = next(found for found in map(modules.own, WORDS) if found is not None)
    positions, types = modules.own(POSITIONS), modules.own(TYPES)
    terms = [modules.prompted(table.gather(rows.ids), rows)]
    if positions is not None:
        terms.append(positions.gather(rows.positions))
    if types is not None:
        terms.append(types.gather(0 if rows.types is None else rows.types))
    x = modules.norm(EMBEDDING_NORM, 0, modules.nodes.total(*terms))
    return modules.linear(PROJECTION, 0, x) if modules.has(PROJECTION) else x


def post_norm(m: Modules, attend: Attention, layer: int, x: Value) -> Value:
    """BERT (Devlin et al. 2019): ``x = LN(x + attention(x)); x = LN(x + FFN(x))``."""
    act = ACTIVATION_NODES[activation_of(m.parts)]
    grid = partial(attend.grid, layer)
    seen = attend.grids(layer, *(m.linear(slot, layer, x, then=grid) for slot in (QUERY, KEY, VALUE)))
    x = m.norm(ATTENTION_NORM, layer, m.linear(OUTPUT, layer, seen, residual=x))
    inner = m.linear(UP, layer, x, then=lambda y: m.gated(DOWN, layer, lambda: act(y)))
    return m.norm(FFN_NORM, layer, m.linear(DOWN, layer, inner, residual=x))


def pre_norm(m: Modules, attend: Attention, layer: int, x: Value) -> Value:
    """ModernBERT (Warner et al. 2024): ``x = x + attention(LN(x)); x = x + GeGLU(LN(x))``; layer 0 lacks a norm."""
    act = ACTIVATION_NODES[activation_of(m.parts)]
    normed = m.norm(ATTENTION_NORM, layer, x) if m.has(ATTENTION_NORM, layer) else x
    x = m.linear(OUTPUT, layer, attend(layer, *m.linear(QKV, layer, normed).split(3, axis=1)), residual=x)
    up, gate = m.linear(UP_GATE, layer, m.norm(FFN_NORM, layer, x)).split(2, axis=1)
    return m.linear(DOWN, layer, m.gated(DOWN, layer, lambda: act(up) * gate), residual=x)
