"""The direct back end's one call: parts in, ONNX out."""

from __future__ import annotations

import onnx_ir

from bertology_serve.export.direct.activations import ACTIVATIONS
from bertology_serve.export.direct.layers import activation_of, encode
from bertology_serve.export.direct.modules import Modules
from bertology_serve.export.direct.nodes import Nodes, Output
from bertology_serve.export.direct.reading import activations_of, read
from bertology_serve.export.direct.rows import Packed, Padded, gather
from bertology_serve.export.parts import Parts
from bertology_serve.export.rows import Weave
from bertology_serve.export.spec import Precision

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "modernbert")


def obstacle(parts: Parts) -> str | None:
    """Why this back end cannot write a model, or ``None`` where it can."""
    if parts.anatomy.family not in FAMILIES:
        return f"{parts.anatomy.family} is not among {', '.join(FAMILIES)}"
    activations = [activation_of(parts), *activations_of(parts.head)]
    unknown = [str(name) for name in activations if name not in ACTIVATIONS]
    if unknown:
        return f"the activation {unknown[0]} is not among {', '.join(name for name in ACTIVATIONS if name)}"
    ropes = getattr(parts.config, "rope_parameters", None) or {}
    scaled = [kind for kind, values in ropes.items() if values and values.get("rope_type") != "default"]
    return f"the rotary positions of {scaled[0]} are scaled" if scaled else None


def emit(parts: Parts, opset: int, unpad: bool, precision: Precision = "fp32", fused: bool = False) -> onnx_ir.Model:
    """The graph of ``parts``, for which there is no ``obstacle``; with ``unpad`` padding is left out of the work.

    ``precision`` fp16 is that of the whole encoder, 8 bits that of its linears; all else is float32. ``fused`` graphs
    have operators of ONNX Runtime's own, for its CUDA provider.

    Inputs and outputs are those of ``graph.Graph``; weights have the same names.
    """
    nodes = Nodes(opset, fused)
    inputs = [nodes.input(name) for name in parts.inputs]
    text = gather(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None)
    rows = (Packed if unpad else Padded)(text, Weave(parts.effects.prompt, parts.first_position))
    with nodes.halves(precision == "fp16"):
        hidden = encode(Modules(nodes, parts, precision), rows)
    hidden = hidden.real() if precision == "fp16" else hidden
    answers = read(nodes, parts, rows, hidden)
    return nodes.model(inputs, *(Output(name, answers[name], shape) for name, shape in parts.outputs.items()))
