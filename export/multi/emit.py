"""The graph of an encoder for many deltas: text and their tensors in, hidden rows out."""

from __future__ import annotations

import onnx_ir

from bertology_serve.export.direct.layers import encode
from bertology_serve.export.direct.nodes import Nodes, Output, Value
from bertology_serve.export.direct.rows import gather
from bertology_serve.export.multi.attention import MixedAttention
from bertology_serve.export.multi.heads import Heads
from bertology_serve.export.multi.modules import MixedModules
from bertology_serve.export.multi.rows import Mixed
from bertology_serve.export.multi.stacks import INDEX
from bertology_serve.export.multi.tables import Tables
from bertology_serve.export.parts import Parts
from bertology_serve.export.spec import Precision

HIDDEN = "hidden"
LOGITS, TOKEN_LOGITS, EMBEDDING = "logits", "token_logits", "embedding"


def emit_hidden(parts: Parts, opset: int, precision: Precision = "fp32") -> onnx_ir.Model:
    """The graph of ``parts`` without a delta; its only output is ``hidden`` [T, H], the rows sequence after sequence.

    A sequence's rows are its text and its delta's prompt; what follows the last sequence means nothing.
    """
    nodes = Nodes(opset)
    texts = [nodes.input(name) for name in parts.inputs]
    delta, tables = nodes.input(INDEX, ("batch",)), Tables(nodes, parts.anatomy)
    _, hidden = encoded(parts, texts, delta, tables, precision)
    inputs = [*texts, delta, *tables.inputs.values()]
    return nodes.model(inputs, Output(HIDDEN, hidden, ("rows", parts.anatomy.hidden)))


def emit_answers(parts: Parts, opset: int, precision: Precision = "fp32", eps: float | None = None) -> onnx_ir.Model:
    """The graph with heads: ``logits`` [B, C], ``token_logits`` [B, L, C], ``embedding`` [B, H].

    A sequence's answer stands in the output that its delta's task has; ``eps`` is that of the norms in heads.
    """
    nodes = Nodes(opset)
    texts = [nodes.input(name) for name in parts.inputs]
    delta, tables, width = nodes.input(INDEX, ("batch",)), Tables(nodes, parts.anatomy), parts.anatomy.hidden
    rows, hidden = encoded(parts, texts, delta, tables, precision)
    heads = Heads(nodes, rows, width, eps)
    pooled = heads.pooled(hidden)
    return nodes.model(
        [*texts, delta, *tables.inputs.values(), *heads.inputs],
        Output(LOGITS, heads.sequences(pooled), ("batch", "labels")),
        Output(TOKEN_LOGITS, heads.tokens(hidden), ("batch", "sequence", "labels")),
        Output(EMBEDDING, heads.embedding(pooled), ("batch", width)),
    )


def encoded(
    parts: Parts, texts: list[Value], delta: Value, tables: Tables, precision: Precision
) -> tuple[Mixed, Value]:
    """The rows of a batch and their last hidden states [T, H]."""
    text = gather(texts[0], texts[1], texts[2] if len(texts) > 2 else None)
    rows = Mixed(text, delta, tables, parts.anatomy.position_offset)
    modules = MixedModules(parts, tables, rows, precision)
    return rows, encode(modules, rows, MixedAttention(modules, tables, rows))
