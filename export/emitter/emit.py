"""The emitter's calls: an encoder with one delta, or for many, as an ONNX graph."""

from __future__ import annotations

import onnx_ir

from bertology_serve.export.emitter.attention_nodes import MixedAttention
from bertology_serve.export.emitter.delta_inputs import INDEX, Tables
from bertology_serve.export.emitter.encoder_nodes import activation_of, encode
from bertology_serve.export.emitter.head_nodes import Heads, activations_of, read
from bertology_serve.export.emitter.module_nodes import MixedModules, Modules
from bertology_serve.export.emitter.nodes import ACTIVATION_NODES, Nodes, Output, Value
from bertology_serve.export.emitter.row_nodes import Mixed, Packed, Padded, gather
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import Precision
from bertology_serve.export.prompt_rows import PromptLayout
from bertology_serve.families import FAMILIES

EMITTED = tuple(name for name, family in FAMILIES.items() if family.emitted)


def obstacle(parts: ExportInputs) -> str | None:
    """Why this back end cannot write a model, or ``None`` where it can."""
    if parts.anatomy.family not in EMITTED:
        return f"{parts.anatomy.family} is not among {', '.join(EMITTED)}"
    activations = [activation_of(parts), *activations_of(parts.head)]
    unknown = [str(name) for name in activations if name not in ACTIVATION_NODES]
    if unknown:
        return f"the activation {unknown[0]} is not among {', '.join(name for name in ACTIVATION_NODES if name)}"
    ropes = getattr(parts.config, "rope_parameters", None) or {}
    scaled = [kind for kind, values in ropes.items() if values and values.get("rope_type") != "default"]
    return f"the rotary positions of {scaled[0]} are scaled" if scaled else None


def emit(
    parts: ExportInputs, opset: int, unpad: bool, precision: Precision = "fp32", fused: bool = False
) -> onnx_ir.Model:
    """The graph of ``parts``, for which there is no ``obstacle``; with ``unpad`` padding is left out of the work.

    ``precision`` fp16 is that of the whole encoder, 8 bits that of its linears; all else is float32. ``fused`` graphs
    have operators of ONNX Runtime's own, for its CUDA provider.

    Inputs and outputs are those of ``graph.Graph``; weights have the same names.
    """
    nodes = Nodes(opset, fused)
    inputs = [nodes.input(name) for name in parts.inputs]
    text = gather(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None)
    rows = (Packed if unpad else Padded)(text, PromptLayout(parts.effects.prompt, parts.first_position))
    with nodes.halves(precision == "fp16"):
        hidden = encode(Modules(nodes, parts, precision), rows)
    hidden = hidden.real() if precision == "fp16" else hidden
    answers = read(nodes, parts, rows, hidden)
    return nodes.model(inputs, *(Output(name, answers[name], shape) for name, shape in parts.outputs.items()))


HIDDEN = "hidden"
LOGITS, TOKEN_LOGITS, EMBEDDING = "logits", "token_logits", "embedding"


def emit_hidden(parts: ExportInputs, opset: int, precision: Precision = "fp32") -> onnx_ir.Model:
    """The graph of ``parts`` without a delta; its only output is ``hidden`` [T, H], the rows sequence after sequence.

    A sequence's rows are its text and its delta's prompt; what follows the last sequence means nothing.
    """
    nodes = Nodes(opset)
    texts = [nodes.input(name) for name in parts.inputs]
    delta, tables = nodes.input(INDEX, ("batch",)), Tables(nodes, parts.anatomy)
    _, hidden = encoded(parts, texts, delta, tables, precision)
    inputs = [*texts, delta, *tables.inputs.values()]
    return nodes.model(inputs, Output(HIDDEN, hidden, ("rows", parts.anatomy.hidden)))


def emit_answers(
    parts: ExportInputs, opset: int, precision: Precision = "fp32", eps: float | None = None
) -> onnx_ir.Model:
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
    parts: ExportInputs, texts: list[Value], delta: Value, tables: Tables, precision: Precision
) -> tuple[Mixed, Value]:
    """The rows of a batch and their last hidden states [T, H]."""
    text = gather(texts[0], texts[1], texts[2] if len(texts) > 2 else None)
    rows = Mixed(text, delta, tables, parts.anatomy.position_offset)
    modules = MixedModules(parts, tables, rows, precision)
    return rows, encode(modules, rows, MixedAttention(modules, tables, rows))
