"""What is timed: the forms that are exported here, and the same merged model in torch and in files of other tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertology_serve.bench.export.checkpoint import prepacked
from bertology_serve.bench.export.export_batches import Arrays
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.emitter.emit import emit
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import PORTABLE, Precision, fastest_on_cpu
from bertology_serve.export.layout import save
from bertology_serve.export.samples import Reference
from bertology_serve.export.session import Session
from bertology_serve.tasks.spec import Encoding

ROUNDED, APPROXIMATE, COARSE = 1e-5, 0.02, 0.3
"""What is accepted of float32, of other tools, which put cheaper GELUs in, and of 8 bits."""
Logits = NDArray[np.float32]
DENSE, UNPADDED = "ours, dense", "ours, unpadded"
DENSE_ROW, UNPADDED_ROW = "ours, dense, int8-row", "ours, unpadded, int8-row"
EAGER, PREPACKED, COMPILED = "torch eager", "torch prepacked", "torch.compile"
ENGINE = "our torch engine"
FORMS: dict[str, tuple[bool, Precision, int]] = {
    DENSE: (False, "fp32", fastest_on_cpu("fp32")),
    f"{DENSE}, opset {PORTABLE}": (False, "fp32", PORTABLE),
    UNPADDED: (True, "fp32", fastest_on_cpu("fp32")),
    f"{UNPADDED}, opset {PORTABLE}": (True, "fp32", PORTABLE),
    DENSE_ROW: (False, "int8-row", fastest_on_cpu("int8-row")),
    UNPADDED_ROW: (True, "int8-row", fastest_on_cpu("int8-row")),
    "ours, unpadded, int8-nbits": (True, "int8-nbits", fastest_on_cpu("int8-nbits")),
    "ours, unpadded, int8-dynamic": (True, "int8-dynamic", fastest_on_cpu("int8-dynamic")),
}
"""Name -> whether padding is left out, precision, opset."""


@dataclass(frozen=True)
class Model:
    """``logits`` answers one batch, [B, ...]; ``size`` is that of its file in bytes, 0 where it is none; ``off`` is how
    far its logits may be from torch's, relative to them in norm, before its speed says nothing."""

    name: str
    logits: Callable[[Arrays], Logits]
    size: int = 0
    off: float = ROUNDED


def exported(export_inputs: ExportInputs, directory: Path) -> list[Model]:
    """Every form, written into ``directory``, which is made, and loaded from there."""
    found = []
    directory.mkdir()
    for number, (name, (unpad, precision, opset)) in enumerate(FORMS.items()):
        path = directory / f"{number}.onnx"
        size = save(emit(export_inputs, opset, unpad, precision), path)
        found.append(Model(name, Session(path).run, size, ROUNDED if precision == "fp32" else COARSE))
    return found


def in_file(name: str, path: Path) -> Model:
    """An ONNX file that another tool wrote, in the same ONNX Runtime."""
    data = path.with_name(path.name + ".data")
    size = sum(one.stat().st_size for one in (path, data) if one.exists())
    return Model(name, Session(path).run, size, APPROXIMATE)


def in_torch(model: Any, compiled: bool) -> list[Model]:
    """HuggingFace's model as it is, with prepacked linears, and compiled for any shape.

    Frozen weights change nothing there: inductor lays them out for oneDNN only where the shape is fixed.
    """
    takes = set(inspect.signature(model.forward).parameters)
    forms = {EAGER: model, PREPACKED: prepacked(model)}
    if compiled:
        forms[COMPILED] = torch.compile(model, dynamic=True)
    return [Model(name, _runner(form, takes)) for name, form in forms.items()]


def engine(encoder: Encoder, delta: Delta) -> Model:
    """The engine that serves, which leaves padding out too, with the delta unmerged; prepacked where that pays."""
    encoder.prepack()
    reference = Reference(encoder, delta)

    def logits(arrays: Arrays) -> Logits:
        return np.stack([row.numpy() for row in reference.outputs(encodings_of(arrays))])

    return Model(ENGINE, logits)


def encodings_of(arrays: Arrays) -> list[Encoding]:
    """The sequences of a batch without its padding."""
    rows = zip(arrays["input_ids"], arrays["token_type_ids"], arrays["attention_mask"].astype(bool), strict=True)
    return [Encoding(tuple(ids[seen].tolist()), tuple(types[seen].tolist())) for ids, types, seen in rows]


def _runner(model: Any, takes: set[str]) -> Callable[[Arrays], Logits]:
    @torch.no_grad()
    def logits(arrays: Arrays) -> Logits:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name in takes}
        return model(**tensors).logits.numpy()  # type: ignore[no-any-return]

    return logits
