"""The ONNX emitter: an encoder's weights become a graph by its formula, without tracing; for one delta or for many."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir
from onnx_ir import DataType

from bertology_serve.errors import Unsupported
from bertology_serve.export.emitter.attention_nodes import Attention
from bertology_serve.export.emitter.delta_inputs import BELOW, INDEX, Tables
from bertology_serve.export.emitter.head_nodes import StackedHeads, activations_of, read
from bertology_serve.export.emitter.module_nodes import Modules
from bertology_serve.export.emitter.nodes import ACTIVATION_NODES, Nodes, Output, Value
from bertology_serve.export.emitter.row_nodes import MixedRows, Packed, Padded, PromptLayout, Rows, TextBatch, gather
from bertology_serve.export.emitter.updates import ManyDeltas, OneDelta
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec, Precision
from bertology_serve.families import FAMILIES
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

EMITTED = tuple(name for name, family in FAMILIES.items() if family.emitted)
GROWING = ("dynamic", "longrope")
"""Rotary positions whose rates depend on how long a sequence is."""


@dataclass(frozen=True)
class BackEnd:
    """What writes a file: the emitter (``direct``) or torch's exporter; whether padding is left out; the opset."""

    direct: bool
    unpad: bool
    opset: int

    @property
    def name(self) -> str:
        """As ``--back-end`` has it."""
        return "direct" if self.direct else "torch"


def choose(export_inputs: ExportInputs, spec: ExportSpec) -> BackEnd:
    """The emitter where it can; raises Unsupported where it was asked for by name, or its options were, and cannot."""
    problem = obstacle(export_inputs) if spec.back_end != "torch" else "another was asked for"
    if spec.precision == "fp16" and export_inputs.positions == "disentangled":
        raise Unsupported(
            f"ONNX Runtime crashes as it loads {export_inputs.anatomy.family} in float16; give another --precision"
        )
    if problem is None:
        return BackEnd(True, spec.unpads, spec.operators)
    if spec.back_end == "direct" or spec.unpad or spec.precision != "fp32":
        raise Unsupported(
            f"the direct back end cannot write this model: {problem}; leave out --back-end, --unpad and "
            "--precision: torch's exporter then writes it, padded and in float32"
        )
    return BackEnd(False, False, spec.operators)


def write(export_inputs: ExportInputs, back_end: BackEnd, spec: ExportSpec) -> onnx_ir.Model:
    """The ONNX model; raises what ``to_onnx`` raises."""
    if back_end.direct:
        return emit(export_inputs, back_end.opset, back_end.unpad, spec.precision, fused=spec.target == "cuda")
    from bertology_serve.export.torch_exporter import Graph, to_onnx  # half a second of imports

    return to_onnx(Graph(export_inputs), back_end.opset)


def obstacle(export_inputs: ExportInputs, many: bool = False) -> str | None:
    """Why the emitter cannot write a model, for ``many`` deltas or for one; ``None`` where it can."""
    family, config = export_inputs.anatomy.family, export_inputs.config
    if family not in EMITTED:
        return f"{family} is not among {', '.join(EMITTED)}"
    if many and export_inputs.positions == "disentangled":
        return f"the relative positions of {family} go through projections that each delta changes"
    packed = [name for name in export_inputs.effects.inner if export_inputs.anatomy.slot(name).part]
    if packed:
        return f"the inputs of {packed[0]} are scaled, which are a part of a packed projection's; give --merge"
    activations = [export_inputs.activation, *activations_of(export_inputs.head)]
    activations += [config.conv_act] if "conv" in export_inputs.anatomy.slots else []
    unknown = [str(name) for name in activations if name not in ACTIVATION_NODES]
    if unknown:
        return f"the activation {unknown[0]} is not among {', '.join(name for name in ACTIVATION_NODES if name)}"
    ropes = getattr(config, "rope_parameters", None) or {}  # by kind of attention, or some of them for all
    ropes = {kind: values for kind, values in ropes.items() if isinstance(values, Mapping)} | {"all": ropes}
    growing = [kind for kind, values in ropes.items() if values.get("rope_type") in GROWING]
    return f"the rotary positions of {growing[0]} depend on a sequence's length" if growing else None


def emit(
    export_inputs: ExportInputs, opset: int, unpad: bool, precision: Precision = "fp32", fused: bool = False
) -> onnx_ir.Model:
    """The graph of one delta, for which there is no ``obstacle``; with ``unpad`` padding is left out of the work.

    ``precision`` fp16 is that of the whole encoder, 8 bits that of its linears; all else is float32. ``fused`` graphs
    have operators of ONNX Runtime's own, for its CUDA provider.
    """
    nodes = Nodes(opset, fused)
    inputs, text = _texts(nodes, export_inputs)
    layout = PromptLayout.of(export_inputs.effects.prompt, export_inputs.first_position)
    rows = (Packed if unpad else Padded)(text, layout)
    with nodes.halves(precision == "fp16"):
        hidden = encode(Modules(export_inputs, OneDelta(nodes, export_inputs, rows), precision), rows)
    answers = read(export_inputs, rows, hidden.real() if precision == "fp16" else hidden)
    return nodes.model(inputs, *(Output(name, answers[name], shape) for name, shape in export_inputs.outputs.items()))


HIDDEN = "hidden"
LOGITS, TOKEN_LOGITS, EMBEDDING = "logits", "token_logits", "embedding"


def emit_hidden(
    export_inputs: ExportInputs,
    opset: int,
    precision: Precision = "fp32",
    first: int = 0,
    end: int | None = None,
    known: Collection[str] | None = None,
) -> onnx_ir.Model:
    """The graph for many deltas; its only output is ``hidden`` [T, H], the rows sequence after sequence.

    A sequence's rows are its text and its delta's prompt; what follows the last sequence means nothing. It runs the
    layers from ``first`` up to ``end``, all by default; from a later one on it takes ``below`` [T, H], the rows that
    the layers before put out. With ``known`` it is for batches that have columns in those tables alone, and asks for
    no other: it is quicker to start, having nothing to decide.
    """
    nodes = Nodes(opset)
    inputs, _, hidden = _mixed(nodes, export_inputs, precision, first, end, known)
    return nodes.model(inputs, Output(HIDDEN, hidden, ("rows", export_inputs.anatomy.hidden)))


def emit_answers(
    export_inputs: ExportInputs, opset: int, precision: Precision = "fp32", eps: float | None = None
) -> onnx_ir.Model:
    """The graph for many with heads: ``logits`` [B, C], ``token_logits`` [B, L, C], ``embedding`` [B, H].

    A sequence's answer stands in the output that its delta's task has; ``eps`` is that of the norms in heads.
    """
    nodes, width = Nodes(opset), export_inputs.anatomy.hidden
    inputs, rows, hidden = _mixed(nodes, export_inputs, precision)
    heads = StackedHeads(nodes, rows, width, eps)
    pooled = heads.pooled(hidden)
    return nodes.model(
        [*inputs, *heads.inputs],
        Output(LOGITS, heads.sequences(pooled), ("batch", "labels")),
        Output(TOKEN_LOGITS, heads.tokens(hidden), ("batch", "sequence", "labels")),
        Output(EMBEDDING, heads.embedding(pooled), ("batch", width)),
    )


def _texts(nodes: Nodes, export_inputs: ExportInputs) -> tuple[list[Value], TextBatch]:
    inputs = [nodes.input(name) for name in export_inputs.inputs]
    return inputs, gather(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None)


def _mixed(
    nodes: Nodes,
    export_inputs: ExportInputs,
    precision: Precision,
    first: int = 0,
    end: int | None = None,
    known: Collection[str] | None = None,
) -> tuple[list[Value], MixedRows, Value]:
    """The inputs, the rows of a batch of many deltas, and their hidden states [T, H] after the layers."""
    texts, text = _texts(nodes, export_inputs)
    delta, tables = nodes.input(INDEX, ("batch",)), Tables(nodes, export_inputs.anatomy, known)
    rows = MixedRows(text, PromptLayout.of_each(tables, delta, export_inputs.anatomy.position_offset), delta)
    modules, inputs = Modules(export_inputs, ManyDeltas(tables, rows), precision), [*texts, delta]
    x = None
    if first:
        below = nodes.input(BELOW, ("below", export_inputs.anatomy.hidden), DataType.FLOAT)
        inputs, x = [*inputs, below], rows.filled(below)
    return [*inputs, *tables.inputs.values()], rows, encode(modules, rows, x, first, end)


PROJECTION, CONV, CONV_NORM = "embedding_projection", "conv", "conv_norm"
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


def encode(modules: Modules, rows: Rows, x: Value | None = None, first: int = 0, end: int | None = None) -> Value:
    """The last hidden states [T, H]: embeddings, then layers with the norm behind each block or before it.

    With ``x`` the rows that enter layer ``first``; before layer ``end`` it stops.
    """
    depth, layer_of = modules.anatomy.layers, pre_norm if modules.anatomy.pre_norm else post_norm
    attend, last = Attention(modules, rows), depth if end is None else end
    embedded = x = embed(modules, rows) if x is None else x
    for layer in range(first, last):
        x = layer_of(modules, attend, layer, x)
        if layer == 0 and modules.has(CONV):
            x = convolve(modules, rows, embedded, x)
    return modules.norm(FINAL_NORM, 0, x) if last == depth and modules.has(FINAL_NORM) else x


def embed(modules: Modules, rows: Rows) -> Value:
    """Words or prompt vectors, plus positions and types, normed; [T, H].

    Where embeddings are narrower than the encoder they are projected: behind the norm (ELECTRA) or before (DeBERTa).
    """
    table = modules.nodes.weight(modules.words, modules.state[modules.words])
    positions, types = modules.own(POSITIONS), modules.own(TYPES)
    terms = [modules.prompted(table.gather(rows.ids), rows)]
    if positions is not None:
        terms.append(positions.gather(rows.positions))
    if types is not None:
        terms.append(types.gather(0 if rows.types is None else rows.types))
    x = modules.nodes.total(*terms)
    if not modules.has(PROJECTION):
        return modules.norm(EMBEDDING_NORM, 0, x)
    if modules.anatomy.slot(EMBEDDING_NORM).outputs != modules.anatomy.embedding_width:
        return modules.norm(EMBEDDING_NORM, 0, modules.linear(PROJECTION, 0, x))
    return modules.linear(PROJECTION, 0, modules.norm(EMBEDDING_NORM, 0, x))


def post_norm(m: Modules, attend: Attention, layer: int, x: Value) -> Value:
    """BERT (Devlin et al. 2019): ``x = LN(x + attention(x)); x = LN(x + FFN(x))``."""
    act, spread = ACTIVATION_NODES[m.activation], partial(attend.spread, layer)
    seen = attend.attended(layer, *(m.linear(slot, layer, x, then=spread) for slot in (QUERY, KEY, VALUE)))
    x = m.norm(ATTENTION_NORM, layer, m.linear(OUTPUT, layer, seen, residual=x))
    inner = m.linear(UP, layer, x, then=lambda y: m.gated(DOWN, layer, lambda: act(y)))
    return m.norm(FFN_NORM, layer, m.linear(DOWN, layer, inner, residual=x))


def pre_norm(m: Modules, attend: Attention, layer: int, x: Value) -> Value:
    """ModernBERT (Warner et al. 2024): ``x = x + attention(LN(x)); x = x + GeGLU(LN(x))``; layer 0 lacks a norm."""
    act = ACTIVATION_NODES[m.activation]
    normed = m.norm(ATTENTION_NORM, layer, x) if m.has(ATTENTION_NORM, layer) else x
    x = m.linear(OUTPUT, layer, attend(layer, *m.linear(QKV, layer, normed).split(3, axis=1)), residual=x)
    up, gate = m.linear(UP_GATE, layer, m.norm(FFN_NORM, layer, x)).split(2, axis=1)
    return m.linear(DOWN, layer, m.gated(DOWN, layer, lambda: act(up) * gate), residual=x)


def convolve(m: Modules, rows: Rows, embedded: Value, x: Value) -> Value:
    """DeBERTa-v2's convolution beside the first layer: ``LN(x + act(conv(embedded)))``, zeros around each sequence."""
    width, path, config = m.anatomy.hidden, m.path(CONV, 0), m.config
    grid = rows.seen.unsqueeze(2).where(rows.grid(embedded, 1, width).squeeze(1), 0.0).transpose(0, 2, 1)
    sizes = {"group": getattr(config, "conv_groups", 1), "pads": [(config.conv_kernel_size - 1) // 2] * 2}
    out = m.nodes("Conv", grid, m.own(f"{path}.weight"), m.own(f"{path}.bias"), **sizes).transpose(0, 2, 1)
    y = m.shifted(CONV, 0, rows.flat(out.unsqueeze(1), 1, width))
    return m.norm(CONV_NORM, 0, m.nodes.total(x, ACTIVATION_NODES[config.conv_act](y)))
