"""Builders of this package's own contenders, for ``worker.py`` in this environment; see there."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from bertology_serve.bench.cpu.other_tools import Batch, Bind, Call, torch_bind
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.linear import Prepacked
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import Unsupported
from bertology_serve.serving.config import EnginePrecision
from bertology_serve.serving.execution.engine_choice import EngineConfig, Name, apply
from bertology_serve.tasks.spec import Encoding

NONE = "none"
"""The delta that changes nothing."""


def encodings_of(batch: Batch) -> list[Encoding]:
    """The sequences of a batch without its padding."""
    rows = zip(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"].astype(bool), strict=True)
    return [Encoding(tuple(ids[seen].tolist()), tuple(types[seen].tolist())) for ids, types, seen in rows]


def engine(
    base: str, deltas: str, threads: int, engine: Name, precision: EnginePrecision = "fp32", changed: bool = True
) -> Bind:
    """The engine that serves, over the deltas of a folder, none of them merged; packing lies inside the timing.

    Without ``changed`` every row has the first delta's task and head, and no change of the encoder.
    """
    if engine not in get_args(Name):
        raise Unsupported(f"this version has no engine {engine!r}")
    torch.set_num_threads(threads)
    encoder = Encoder.load(base, light=True)
    found = [encoder.read_delta(path, path.name) for path in sorted(Path(deltas).iterdir())]
    none = Delta(NONE, encoder.ref, found[0].task, head=found[0].head, version="1")
    pipeline = Pipeline(encoder, [*found, none])
    _, taken = apply(pipeline, EngineConfig(engine, precision))
    if taken.precision != precision:
        raise Unsupported(f"{precision} is no faster than {taken.precision} on this processor")
    ready = {name: pipeline.loaded(name) for name in pipeline.deltas}

    def bind(batch: Batch) -> Call:
        owners = [ready[owner if changed else NONE] for owner in batch["owners"]]
        jobs = [(one, encoding) for one, encoding in zip(owners, encodings_of(batch), strict=True) if one is not None]

        def call() -> NDArray[np.float32]:
            with torch.inference_mode():  # as a server asks
                return np.stack([row.numpy() for row in pipeline.outputs(jobs)])

        return call

    return bind


class _Packed(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = Prepacked(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def transformers_prepacked(checkpoint: str, threads: int) -> Bind:
    """HuggingFace's own model in torch, its linears laid out for oneDNN as the torch engine may have them."""
    torch.set_num_threads(threads)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, _Packed(child))
    return torch_bind(model, "")
