"""ONNX files: their metadata, and where the weights lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir

EXTERNAL_OVER = 1_800_000_000
"""Bytes of weights from which they get a file of their own; a protobuf ends at 2 GiB."""
DATA_SUFFIX = "_data"


def annotate(model: onnx_ir.Model, metadata: Mapping[str, str]) -> None:
    """Writes metadata, sorted, in place of what the exporter left."""
    model.metadata_props.clear()
    model.metadata_props.update(sorted(metadata.items()))
    model.graph.name = "main"


def save(model: onnx_ir.Model, path: Path, external_over: int | None = None) -> int:
    """Writes the file, and ``model.onnx_data`` beside it for large weights; returns the bytes of both."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = path.with_name(path.name + DATA_SUFFIX)
    if weights > (EXTERNAL_OVER if external_over is None else external_over):
        onnx_ir.save(model, path, external_data=data.name)
    else:
        onnx_ir.save(model, path)
    return sum(file.stat().st_size for file in (path, data) if file.exists())
