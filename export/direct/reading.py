"""From the last hidden rows to the outputs: pooling and head, or the head at every token."""

from __future__ import annotations

from bertology_serve.export.direct.activations import ACTIVATIONS
from bertology_serve.export.direct.nodes import Nodes, Value, joined
from bertology_serve.export.direct.rows import Rows
from bertology_serve.export.parts import Parts
from bertology_serve.export.session import LOGITS, POOLED, ROWS
from bertology_serve.tasks.heads import Head, Layer
from bertology_serve.tasks.spec import EMBEDDING, QUESTION_ANSWERING


def read(nodes: Nodes, parts: Parts, rows: Rows, hidden: Value) -> dict[str, Value]:
    """hidden [T, H] -> ``parts.outputs`` by name."""
    task = parts.task
    if task.kind == QUESTION_ANSWERING:
        out = rows.callers(answered(nodes, parts, hidden))
        return {name: out.gather(column, 2) for column, name in enumerate(parts.outputs)}
    if task.per_token:
        return {LOGITS: rows.callers(answered(nodes, parts, hidden))}
    out = answered(nodes, parts, pooled(parts, rows, hidden))
    if task.kind != EMBEDDING:
        return {LOGITS: out}
    return {ROWS: rows.callers(hidden), POOLED: unit(nodes, out) if task.normalize else out}


def pooled(parts: Parts, rows: Rows, hidden: Value) -> Value:
    """One row a sequence, of text alone: [T, H] -> [B, H].

    The mean is a product with the mask, taken twice: ONNX Runtime's sum over an axis rounds differently for one
    sequence than for several, and its product of one row by how wide the grid is. In its product of two rows padding
    adds zeros and nothing else, so that an answer does not depend on its neighbours even in the last bit.
    """
    if parts.task.pooling == "cls":
        return rows.first(hidden)
    grid = rows.grid(hidden, 1, parts.anatomy.hidden).squeeze(1)
    if parts.task.pooling == "max":
        return rows.spoken.unsqueeze(2).where(grid, rows.nodes.lowest).reduce("Max", 1)
    spoken = rows.spoken.real().unsqueeze(1)
    return (joined(1, spoken, spoken) @ grid).gather(0, 1) / rows.text.count.real()


def answered(nodes: Nodes, parts: Parts, rows: Value) -> Value:
    """The head: ``LN(act(x W + b))`` layer after layer, as ``tasks.heads`` has it."""
    for layer in parts.head.layers:
        assert isinstance(layer, Layer)
        rows = _dense(nodes, parts, layer, rows)
    return rows


def _dense(nodes: Nodes, parts: Parts, layer: Layer, x: Value) -> Value:
    form, linear, norm = layer.form, layer.linear, layer.norm
    y = x @ nodes.weight(parts.named_in_head(f"{form.path}.weight"), linear.weight.T)
    if linear.bias is not None:
        y = y + nodes.weight(parts.named_in_head(f"{form.path}.bias"), linear.bias)
    y = ACTIVATIONS[form.activation](y)
    if norm is None:
        return y
    scale = nodes.weight(parts.named_in_head(f"{form.norm}.weight"), norm.weight)
    shift = None if norm.bias is None else nodes.weight(parts.named_in_head(f"{form.norm}.bias"), norm.bias)
    return nodes("LayerNormalization", y, scale, shift, axis=-1, epsilon=norm.eps)


def unit(nodes: Nodes, x: Value) -> Value:
    """Rows of length 1."""
    return x / nodes("Max", nodes("ReduceL2", x, [1], keepdims=1), 1e-12)


def activations_of(head: Head) -> list[str | None]:
    """The names of the activations in a head."""
    return [layer.form.activation for layer in head.layers if isinstance(layer, Layer)]
