"""The tasks that all alternatives answer, in the form that each of them reads."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from bertology_serve.bench.cpu.subject import task_model
from bertology_serve.bench.prove.stage import LENGTH, Stage
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.loading import locate
from bertology_serve.export.emitter.emit import choose, write
from bertology_serve.export.export_directory import save
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec, Precision
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import CLASSIFICATION, TaskSpec

LABELS = ("bad", "good", "so-so")
TASK = TaskSpec(CLASSIFICATION, LABELS, LENGTH)
RANK = 8
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8-row")
"""Of the merged ONNX models."""


@dataclass(frozen=True)
class Made:
    """``count`` random LoRA classifiers over the checkpoint ``base``: d0, d1 and so on.

    ``directory`` holds them as deltas, which are peft's adapters too, merged as checkpoints, and merged in ONNX.
    """

    directory: Path
    base: Path
    count: int

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [f"d{number}" for number in range(self.count)]

    @property
    def deltas(self) -> Path:
        """NAME/VERSION/ of exactly these."""
        return self.directory / f"deltas-{self.count}"

    def adapter(self, name: str) -> Path:
        """One delta, as peft reads it."""
        return self.deltas / name / "1"

    def checkpoint(self, name: str) -> Path:
        """One merged model, as transformers reads it."""
        return self.directory / "checkpoints" / name

    def onnx(self, name: str, precision: Precision = "fp32") -> Path:
        """One merged model, as ONNX Runtime reads it."""
        return self.directory / f"onnx-{precision}" / f"{name}.onnx"


def make(stage: Stage, directory: Path, count: int, different: int) -> Made:
    """Writes what is not there yet. From the ``different``-th on merged models are copies of those before.

    They cost as much to run and to hold. Checkpoints are copied as files of their own, because transformers maps them
    into memory, where copies by name would be shared; ONNX Runtime reads its files.
    """
    made = Made(directory, Path(locate(stage.backbone)), count)
    for folder in (made.checkpoint(""), *(made.onnx("", precision).parent for precision in PRECISIONS)):
        folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(made.names):
        delta = stage.random(name, Lora(rank=RANK), TASK, number)
        delta.save(made.adapter(name), stage.encoder)
        if made.onnx(name).exists():
            continue
        if number < different:
            _merge(stage, made, delta)
        else:
            like = f"d{number % different}"
            shutil.copytree(made.checkpoint(like), made.checkpoint(name))
            for precision in PRECISIONS:
                os.link(made.onnx(like, precision), made.onnx(name, precision))
    return made


def _merge(stage: Stage, made: Made, delta: Delta) -> None:
    for precision in PRECISIONS:
        spec = ExportSpec(merge=True, precision=precision)
        export_inputs = ExportInputs.of(stage.encoder, delta, True, precision)
        save(write(export_inputs, choose(export_inputs, spec), spec), made.onnx(delta.name, precision))
    model = task_model(ExportInputs.of(stage.encoder, delta, True), delta)
    model.config.id2label, model.config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
    model.save_pretrained(made.checkpoint(delta.name))
    stage.encoder.tokenizer.save_pretrained(made.checkpoint(delta.name))
