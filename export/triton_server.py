"""What NVIDIA Triton Inference Server reads beside a model: config.pbtxt and the file of labels.

The directory is one model of a model repository; Triton takes its name from the directory's. Tokenisation is left
out: clients send ids. Triton batches only requests of one length together, so clients do well to pad to a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bertology_serve.export.parts import Parts
from bertology_serve.tasks.spec import CLASSIFICATION

CONFIG, LABELS = "config.pbtxt", "labels.txt"
MOST_ROWS, THREADS = 64, 1


def write_config(directory: Path, parts: Parts, gpu: bool = False) -> None:
    """Writes both files; labels where a row of the output is one decision. ``gpu``: it is to run on one."""
    labels = parts.task.labels if parts.task.kind == CLASSIFICATION else ()
    if labels:
        text = "".join(" ".join(label.split()) + "\n" for label in labels)
        (directory / LABELS).write_text(text, encoding="utf-8")
    (directory / CONFIG).write_text(config(parts, labelled=bool(labels), gpu=gpu), encoding="utf-8")


def config(parts: Parts, labelled: bool, gpu: bool = False) -> str:
    """The model configuration, in protobuf's text format (``model_config.proto``); batch is its first dimension."""
    inputs = ",\n".join(_tensor(name, "TYPE_INT64", [-1]) for name in parts.inputs)
    outputs = ",\n".join(
        _tensor(name, "TYPE_FP32", [-1 if isinstance(n, str) else n for n in shape[1:]], LABELS if labelled else None)
        for name, shape in parts.outputs.items()
    )
    return (
        f'backend: "onnxruntime"\nmax_batch_size: {MOST_ROWS}\n'
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
        "dynamic_batching { }\n"
        f"instance_group [ {{ kind: {'KIND_GPU' if gpu else 'KIND_CPU'}, count: 1 }} ]\n"
        f'parameters {{ key: "intra_op_thread_count", value: {{ string_value: "{THREADS}" }} }}\n'
    )


def _tensor(name: str, kind: str, dims: Sequence[int], labels: str | None = None) -> str:
    more = f', label_filename: "{labels}"' if labels else ""
    return f'  {{ name: "{name}", data_type: {kind}, dims: [ {", ".join(map(str, dims))} ]{more} }}'
