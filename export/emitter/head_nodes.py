"""From the last hidden rows to the outputs: pooling and head, or the head at every token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from bertology_serve.export.emitter.nodes import ACTIVATION_NODES, Nodes, Value, counted, joined
from bertology_serve.export.emitter.row_nodes import MixedRows, Rows, Runs, changes, tile
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.session import LOGITS, POOLED, ROWS, SPARSE_WEIGHTS, VECTORS
from bertology_serve.tasks.heads import Head, Layer, WordScores
from bertology_serve.tasks.spec import MULTI_VECTOR, POOLED_KINDS, QUESTION_ANSWERING, SPARSE


def read(export_inputs: ExportInputs, rows: Rows, hidden: Value) -> dict[str, Value]:
    """The answers of one delta: hidden [T, H] -> ``export_inputs.outputs`` by name."""
    task = export_inputs.task
    if task.kind == QUESTION_ANSWERING:
        out = rows.callers(_answered(export_inputs, hidden))
        return {name: out.gather(column, 2) for column, name in enumerate(export_inputs.outputs)}
    if task.kind == SPARSE:
        best = pooled(rows, _answered(export_inputs, hidden), task.width, "max")
        return {SPARSE_WEIGHTS: best.nodes("Log", best.nodes("Relu", best) + 1.0)}
    if task.kind == MULTI_VECTOR:
        vectors = _answered(export_inputs, hidden)
        return {VECTORS: rows.callers(unit(vectors) if task.unit else vectors)}
    if task.per_token:
        return {LOGITS: rows.callers(_answered(export_inputs, hidden))}
    out = _answered(export_inputs, pooled(rows, hidden, export_inputs.anatomy.hidden, task.pooling))
    if task.kind not in POOLED_KINDS:
        return {LOGITS: out}
    return {ROWS: rows.callers(hidden), POOLED: unit(out) if task.normalize else out}


def pooled(rows: Rows, hidden: Value, width: int, how: str) -> Value:
    """One row a sequence, of text alone: [T, width] -> [B, width].

    The mean is a product with the mask, taken twice: ONNX Runtime's sum over an axis rounds differently for one
    sequence than for several, and its product of one row by how wide the grid is. In its product of two rows padding
    adds zeros and nothing else, so that an answer does not depend on its neighbours even in the last bit.
    """
    if how == "cls":
        return rows.first(hidden)
    grid = rows.grid(hidden, 1, width).squeeze(1)
    if how == "max":
        return rows.spoken.unsqueeze(2).where(grid, rows.nodes.lowest).reduce("Max", 1)
    spoken = rows.spoken.real().unsqueeze(1)
    return (joined(1, spoken, spoken) @ grid).gather(0, 1) / rows.text.count.real()


def _answered(export_inputs: ExportInputs, x: Value) -> Value:
    """The head: ``LN(act(x W + b))`` layer after layer, as ``tasks.heads`` has it."""

    def own(path: str, tensor: Tensor | None) -> Value | None:
        return None if tensor is None else x.nodes.weight(export_inputs.named_in_head(path), tensor)

    for layer in export_inputs.head.layers:
        assert isinstance(layer, Layer)
        form, linear, norm = layer.form, layer.linear, layer.norm
        table: Value | None
        if isinstance(linear, WordScores):  # the table that ids are looked up in, which may be float16
            table = x.nodes.weight(export_inputs.words, linear.weight).real().transpose(1, 0)
        else:
            table = own(f"{form.path}.weight", linear.weight.T)
        x, bias = x @ table, own(f"{form.path}.bias", linear.bias)
        x = ACTIVATION_NODES[form.activation](x if bias is None else x + bias)
        if norm is not None:
            scale, shift = own(f"{form.norm}.weight", norm.weight), own(f"{form.norm}.bias", norm.bias)
            x = x.nodes("LayerNormalization", x, scale, shift, axis=-1, epsilon=norm.eps)
    return x


def unit(x: Value) -> Value:
    """Rows of length 1."""
    return x / x.nodes("Max", x.nodes("ReduceL2", x, [1], keepdims=1), 1e-12)


def activations_of(head: Head) -> list[str | None]:
    """The names of the activations in a head."""
    return [layer.form.activation for layer in head.layers if isinstance(layer, Layer)]


DENSE, OUT, ACTIVATION, POOLING, PER_TOKEN, UNIT = range(6)
"""Columns of ``head.form``. ``UNIT``: the embedding is brought to length 1."""
FORM = "head.form"
POOLINGS = ("cls", "mean", "max")
HEAD_ACTIVATIONS = (None, "tanh", "gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh")


class StackedHeads:
    """The heads' inputs, and the outputs of a batch; ``eps`` is that of the heads' norms, ``None`` without norms."""

    def __init__(self, nodes: Nodes, rows: MixedRows, hidden: int, eps: float | None) -> None:
        self.nodes, self.rows, self.hidden, self.eps = nodes, rows, hidden, eps
        self.form = nodes.input(FORM, ("deltas", UNIT + 1))
        shapes: dict[str, tuple[str | int, ...]] = {
            "dense": ("head.dense.height", hidden, hidden),
            "dense_bias": ("head.dense.height", hidden),
            "out": ("head.out.height", hidden, "labels"),
            "out_bias": ("head.out.height", "labels"),
        }
        if eps is not None:
            shapes |= {"norm": ("head.dense.height", hidden), "norm_bias": ("head.dense.height", hidden)}
        self.stacks = {name: nodes.input(f"head.{name}", shape, ir.DataType.FLOAT) for name, shape in shapes.items()}

    @property
    def inputs(self) -> list[Value]:
        """All of them."""
        return [self.form, *self.stacks.values()]

    def pooled(self, hidden: Value) -> Value:
        """hidden [T, H] -> [B, H], every sequence pooled its delta's way."""
        nodes, rows = self.nodes, self.rows
        kind = self._of(rows.delta, POOLING)

        def spread() -> Value:
            found = [pooled(rows, hidden, self.hidden, how) for how in POOLINGS]
            return nodes("Equal", kind, 0).where(found[0], nodes("Equal", kind, 1).where(found[1], found[2]))

        return nodes.choose(self._any(kind), spread, lambda: rows.first(hidden))

    def embedding(self, pooled: Value) -> Value:
        """[B, H], of unit length where the delta wants that."""
        return self.nodes("Equal", self._of(self.rows.delta, UNIT), 1).where(unit(pooled), pooled)

    def sequences(self, pooled: Value) -> Value:
        """pooled [B, H] -> [B, C]; zeros beyond a delta's own labels, and where it has no such head."""
        nodes, delta, batch = self.nodes, self.rows.delta, self.rows.batch
        each, tiles = tile(batch, changes(delta).integer().reduce("Sum", 0, keep=True))
        filled = nodes("Min", counted(nodes, each * tiles), batch - 1)
        out = nodes("Slice", self._answered(Runs(delta.gather(filled), each), pooled.gather(filled)), [0], batch, [0])
        return nodes("Equal", self._of(delta, PER_TOKEN), 1).where(0.0, out)

    def tokens(self, hidden: Value) -> Value:
        """hidden [T, H] -> [B, L, C], zero at padding and for deltas that answer once a sequence."""
        nodes, rows = self.nodes, self.rows
        wanted = self._of(rows.delta, PER_TOKEN)

        def answered() -> Value:
            out = rows.callers(self._answered(rows.runs, hidden))
            return nodes("Equal", wanted, 1).unsqueeze(2).where(out, 0.0)

        def nothing() -> Value:
            labels = self.stacks["out_bias"].size(1)
            return nodes("Expand", nodes.value(0.0), joined(0, rows.batch, rows.text.seen.size(1), labels))

        return nodes.choose(self._any(wanted), answered, nothing)

    def _answered(self, runs: Runs, x: Value) -> Value:
        """x [n, H], whose owners ``runs`` knows -> [n, C]."""
        dense = self._of(runs.index, DENSE)
        x = self.nodes.choose(self._any(dense), lambda: self._dense(runs, x, dense), lambda: x)
        return self._linear(runs, x, "out", OUT)

    def _dense(self, runs: Runs, x: Value, dense: Value) -> Value:
        """``LN(act(x W + b))`` for the rows whose form has it."""
        y, kind = self._linear(runs, x, "dense", DENSE), self._of(runs.index, ACTIVATION)
        acted = y
        for number, name in enumerate(HEAD_ACTIVATIONS[1:], 1):
            acted = self.nodes("Equal", kind, number).where(ACTIVATION_NODES[name](y), acted)
        if self.eps is not None:
            ones, row = self.nodes.constant(np.ones(self.hidden, np.float32)), dense.squeeze(1)
            acted = self.nodes("LayerNormalization", acted, ones, axis=-1, epsilon=self.eps)
            acted = acted * self.stacks["norm"].gather(row) + self.stacks["norm_bias"].gather(row)
        return self.nodes("Equal", dense, 0).where(x, acted)

    def _linear(self, runs: Runs, x: Value, stack: str, column: int) -> Value:
        """Rows [n, K] times their owners' matrices, plus their biases -> [n, N]."""
        nodes, weight, bias = self.nodes, self.stacks[stack], self.stacks[f"{stack}_bias"]
        which = self.form.gather([column], 1).squeeze(1).gather(runs.owners)
        every = runs.tiled(x, self.hidden).unsqueeze(1) @ weight.gather(which) + bias.gather(which).unsqueeze(2)
        own = (every * runs.mask.transpose(0, 2, 1).unsqueeze(3)).reduce("Sum", 1)
        return nodes("Reshape", own, joined(0, nodes.value([-1]), bias.size(1)))

    def _of(self, delta: Value, column: int) -> Value:
        """[n, 1]: one column of the form, for rows of deltas [n]."""
        return self.form.gather([column], 1).gather(delta)

    def _any(self, column: Value) -> Value:
        return self.nodes("Greater", column.reduce("Max", 0).squeeze(0), 0)
