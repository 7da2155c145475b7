"""From a graph to an ONNX file by torch's dynamo exporter: the same bytes every time, with no path of this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

from bertology_serve.errors import Unsupported
from bertology_serve.export.graph import Graph

_CHATTY = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
_KNOWN = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, "# The axis name: (batch|sequence) will not be used"),
)


def to_onnx(graph: Graph, opset: int) -> onnx_ir.Model:
    """Exports a graph with dynamic batch and sequence; weights are called as ``Graph.names`` says.

    Raises Unsupported where torch cannot trace or translate the model.
    """
    inputs = graph.inputs
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in inputs)
    with _quiet(), torch.no_grad():
        model = _traced(graph, example, opset, dynamic_shapes=tuple(sizes for _ in inputs))
        _simplify(model)
    _rename(model, graph.names)
    common.ClearMetadataAndDocStringPass()(model)
    return model


def _traced(graph: Graph, example: tuple[torch.Tensor, ...], opset: int, dynamic_shapes: Any) -> onnx_ir.Model:
    try:
        program = torch.onnx.export(
            graph,
            example,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise Unsupported(f"torch cannot turn {type(graph.model).__name__} into ONNX: {reason}") from error
    assert program is not None
    model: onnx_ir.Model = program.model
    return model


def _simplify(model: onnx_ir.Model) -> None:
    """onnxscript's optimiser, but equal small weights stay apart: each tensor of a delta is found under its name."""
    weights = set(model.graph.initializers)
    optimizer.fold_constants(model)
    rewriter.rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _deduplicate(model, weights)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _deduplicate(model: onnx_ir.Model, weights: set[str]) -> None:
    """One initialiser for equal constants that the exporter made."""
    first: dict[tuple[str, tuple[object, ...], bytes], onnx_ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None:
            continue
        kept = first.setdefault((str(tensor.dtype), tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]


def _rename(model: onnx_ir.Model, names: Mapping[str, str]) -> None:
    for path, name in names.items():
        if path in model.graph.initializers:
            model.graph.initializers[path].name = name


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says of itself: two warnings, and log lines about torchvision and about folding."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind, message in _KNOWN:
                warnings.filterwarnings("ignore", message, kind)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
