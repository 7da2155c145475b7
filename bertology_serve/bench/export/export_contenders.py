"""What is timed: the forms that are exported here, the same merged model in torch, and files of other tools.

The others' exporters run in environments of their own, whose pins exclude ours, on the checkpoint written for them."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertology_serve.bench.export.export_batches import Arrays
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.linear import Prepacked
from bertology_serve.errors import Unsupported
from bertology_serve.export import hf_model
from bertology_serve.export.emitter.emit import emit
from bertology_serve.export.export_directory import architectures, save
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import PORTABLE, Precision, fastest_on_cpu
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


def task_model(export_inputs: ExportInputs, delta: Delta) -> Any:
    """HuggingFace's own model for the task, float32, on CPU, not training, its attention SDPA.

    ``export_inputs`` are those of the merged delta. Raises Unsupported where something of it does not fold, or where
    HuggingFace has no model for the task.
    """
    names = architectures(delta)
    if not names or delta.effects(export_inputs.anatomy).unfoldable:
        raise Unsupported(f"delta {delta.name!r} is no checkpoint that others could export; give one that folds")
    return hf_model.task_model(export_inputs, names[0], "sdpa")


class _Packed(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = Prepacked(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def prepacked(model: Any) -> Any:
    """A copy of a model with its linears laid out for oneDNN."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, _Packed(child))
    return model


OPTIMUM_O0, OPTIMUM_O3, OLIVE = "optimum O0", "optimum O3", "Olive"
SECONDS = 600
_OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
source, target, level = sys.argv[1:]
main_export(source, target, task="text-classification", optimize=None if level == "O0" else level, do_validation=False)
"""
_OLIVE = """
import sys
from olive.workflows import run
source, target, family = sys.argv[1:]
run({
    "input_model": {"type": "HfModel", "model_path": source, "task": "text-classification"},
    "systems": {"here": {"type": "LocalSystem", "accelerators": [
        {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}},
    "passes": {"convert": {"type": "OnnxConversion"},
               "optimise": {"type": "OrtTransformersOptimization", "model_type": family}},
    "host": "here", "target": "here", "output_dir": target, "cache_dir": target + "/cache",
})
"""


@dataclass(frozen=True)
class Tool:
    """An exporter: what it is called, a script for its own Python, and how to install it there."""

    name: str
    script: str
    argument: str
    install: str


_OPTIMUM_PINS = "torch transformers==4.57.6 'optimum-onnx[onnxruntime]==0.1.0'"
TOOLS = {
    "optimum": (Tool(OPTIMUM_O0, _OPTIMUM, "O0", _OPTIMUM_PINS), Tool(OPTIMUM_O3, _OPTIMUM, "O3", _OPTIMUM_PINS)),
    "olive": (Tool(OLIVE, _OLIVE, "bert", "torch transformers peft onnxruntime requests olive-ai==0.13.0"),),
}


def python_of(environment: Path, tool: Tool) -> Path:
    """The Python of a virtual environment; Unsupported where there is none."""
    python = environment / "bin" / "python"
    if not python.exists():
        raise Unsupported(
            f"no virtual environment for {tool.name} at {environment}; make one: "
            f"python -m venv {environment} && {python} -m pip install {tool.install}"
        )
    return python


def exported_by(tool: Tool, environment: Path, checkpoint: Path, directory: Path) -> Model:
    """The file that ``tool`` makes of a checkpoint, loaded here; Unsupported with its last line where it fails."""
    python = python_of(environment, tool).absolute()  # not resolved: the link is what makes it the environment's
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    command = [str(python), "-c", tool.script, str(checkpoint), str(directory), tool.argument]
    try:
        done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Unsupported(f"{tool.name} took more than {SECONDS} s to export; leave it out") from None
    if done.returncode or not (directory / "model.onnx").exists():
        said = (done.stderr.strip() or "no model.onnx").splitlines()[-1][:200]
        raise Unsupported(f"{tool.name} could not export the checkpoint: {said}; in its environment: {tool.install}")
    return in_file(tool.name, directory / "model.onnx")
