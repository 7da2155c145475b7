"""What an exported file says of itself, and how it is saved. No time, no path: the same delta gives the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import onnx_ir

import bertology_serve
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.export.back_ends import Chosen
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.tasks.spec import EMBEDDING, MULTI_LABEL, MULTIPLE_CHOICE, QUESTION_ANSWERING

TASK_OPTIONS = ("head", "stride", "max_answer_length", "normalize", "token_types", "pairs", "thresholds", "abstain")
"""Fields of the task that say how texts are cut and answers read."""
SEMANTICS = (
    "int64 [batch, sequence]; attention_mask is 1 for tokens and 0 for padding, which may stand on either side; "
    "a sequence is at most max_length tokens; a row of padding alone has no meaning"
)


def metadata(
    encoder: Encoder, delta: Delta, parts: ExportInputs, spec: ExportSpec, chosen: Chosen, name: str
) -> dict[str, str]:
    """Facts by name, all texts; lists and objects are JSON."""
    task = delta.task
    facts: dict[str, Any] = {
        "name": name,
        "task": task.kind,
        "labels": list(task.labels),
        "pooling": task.pooling,
        "max_length": longest(encoder, delta),
        "task_options": {name: getattr(task, name) for name in TASK_OPTIONS},
        "base_name": base_name(delta),
        "base_sha256": delta.base.sha256,
        "base_family": delta.base.family,
        "delta_name": delta.name,
        "delta_version": delta.version,
        "delta_sha256": delta_hash(delta),
        "kinds": list(delta.kinds),
        "merged": spec.merge,
        "inputs": f"{', '.join(parts.inputs)}: {SEMANTICS}",
        "outputs": f"{', '.join(parts.outputs)}: {_output(delta)}",
        "precision": spec.precision,
        "target": spec.target,
        "verification": f"answers {_bound(spec, encoder.anatomy.layers)} the unmerged float32 torch engine "
        "in ONNX Runtime, or this file would not have been published; the figures are in verification.json",
        "opset": chosen.opset,
        "back_end": chosen.name,
        "unpadded": chosen.unpad,
        "tool": f"bertology-serve {bertology_serve.__version__}",
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in facts.items()
    }


def _bound(spec: ExportSpec, layers: int) -> str:
    drift = spec.drift(layers)
    if drift:
        return f"with ‖Δ‖/‖·‖ at most {drift:.2g} against"
    return f"within {f'{spec.atol:g}' if spec.atol else f'what float32 rounds in {layers} layers'} of"


def longest(encoder: Encoder, delta: Delta) -> int:
    """The longest sequence in tokens that the task reads and the encoder has positions for."""
    effects = delta.effects(encoder.anatomy)
    shifted = 0
    if effects.prompt is not None and effects.prompt.positions == "shifted":
        shifted += int(effects.prompt.vectors.shape[0])
    if effects.prefix is not None and effects.prefix.positions == "shifted":
        shifted += int(effects.prefix.keys.shape[1])
    return min(delta.task.max_length, encoder.max_tokens, encoder.anatomy.max_tokens - shifted)


def base_name(delta: Delta) -> str:
    """The base as the delta calls it; of a directory, its last part."""
    path = PurePath(delta.base.name)
    return path.name if path.is_absolute() or delta.base.name.startswith((".", "~")) else delta.base.name


def delta_hash(delta: Delta) -> str:
    """SHA-256 over a delta's specs, task and tensors, however it is stored."""
    digest = hashlib.sha256(f"{delta.specs!r}\n{delta.task!r}\n".encode())
    for tensors in (delta.tensors, delta.head, delta.weights):
        digest.update(weights_hash(tensors).encode())
    return digest.hexdigest()


def _output(delta: Delta) -> str:
    task = delta.task
    if task.kind == EMBEDDING:
        unit = "of unit length" if task.normalize else "not normalised"
        return f"float32 [batch, sequence, hidden], zero at padding, and pooled [batch, hidden], {unit}"
    if task.kind == MULTIPLE_CHOICE:
        return "float32 [batch, 1], one row a choice: the caller groups a question's rows and takes the largest"
    if task.kind == QUESTION_ANSWERING:
        return "float32 [batch, sequence] each, before any softmax, zero at padding"
    shape = f"[batch, sequence, {task.outputs}], zero at padding" if task.per_token else f"[batch, {task.outputs}]"
    return f"float32 {shape}, before any {'sigmoid' if task.kind == MULTI_LABEL else 'softmax'}"


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
