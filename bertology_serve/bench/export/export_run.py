"""``bench export``: every form, and the alternatives, on the same weights and the same batches."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bertology_serve.bench.export.accuracy import Accuracy, Closeness, Gold, closeness
from bertology_serve.bench.export.export_batches import FULL, Batches, as_they_come, full
from bertology_serve.bench.export.export_contenders import (
    COMPILED,
    FORMS,
    TOOLS,
    Model,
    engine,
    exported,
    exported_by,
    in_torch,
    task_model,
)
from bertology_serve.bench.export.timing import Timed, interleave
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported, VerificationError
from bertology_serve.export.emitter.emit import emit
from bertology_serve.export.export_directory import save
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.installation import environment
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, Encoding, TaskSpec

EXPORTS = 5


@dataclass(frozen=True)
class Inputs:
    """What is measured: texts as they come, labelled examples for the metric (none: no metric), environments of other
    tools by name, and whether torch.compile takes part."""

    texts: Sequence[Encoding]
    task: Task | None = None
    examples: Sequence[Any] = ()
    tools: Mapping[str, Path] = field(default_factory=dict)
    compiled: bool = True


@dataclass(frozen=True)
class Result:
    """Times by batches, accuracies and closenesses by name; ``export_seconds`` and ``same_bytes`` by form; ``missing``
    says why contenders are not there."""

    batches: Sequence[Batches]
    times: Mapping[str, Sequence[Timed]]
    sizes: Mapping[str, int]
    accuracies: Mapping[str, Accuracy]
    closenesses: Mapping[str, Closeness]
    export_seconds: Mapping[str, float]
    same_bytes: Mapping[str, bool]
    environment: Mapping[str, Any]
    missing: Sequence[str] = ()


def bare(encoder: Encoder) -> Delta:
    """A delta that changes nothing, with a random head of two classes."""
    task = TaskSpec(CLASSIFICATION, ("a", "b"))
    head = encoder.head(task, torch.Generator().manual_seed(0))
    return Delta("bare", encoder.ref, task, head=head.own_tensors(), version="1")


def run(
    encoder: Encoder, delta: Delta, inputs: Inputs, rounds: int, say: Callable[[str], None] = lambda line: None
) -> Result:
    """Exports, checks that all agree, measures accuracy, then times in turns.

    Raises Unsupported for a task that is not one row of logits a sequence, VerificationError where contenders differ.
    """
    if delta.task.kind not in (CLASSIFICATION, REGRESSION):
        raise Unsupported(f"delta {delta.name!r} answers {delta.task.kind}; expected classification or regression")
    where, export_inputs = environment(), ExportInputs.of(encoder, delta, True, "int8-row")
    batches = [*(full(encoder, *shape) for shape in FULL), as_they_come(encoder, "texts as they come", inputs.texts)]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        seconds, same = export_times(encoder, delta, directory)
        say("exported; other tools export")
        models, missing = contenders(encoder, delta, export_inputs, inputs, directory)
        for one in batches:
            check(models, one)
        say(f"{len(models)} contenders agree; accuracy")
        close = closeness(encoder, delta, export_inputs, batches[-1], directory / "embeddings")
        accuracies = accuracies_of(encoder, inputs, models)
        times = {one.name: _timed(models, one, rounds, say) for one in batches}
    sizes = {model.name: model.size for model in models}
    return Result(batches, times, sizes, accuracies, close, seconds, same, where, missing)


def contenders(
    encoder: Encoder, delta: Delta, export_inputs: ExportInputs, inputs: Inputs, directory: Path
) -> tuple[list[Model], list[str]]:
    """Torch's eager form first; and why some are missing."""
    model = task_model(export_inputs, delta)
    checkpoint = directory / "checkpoint"
    model.save_pretrained(checkpoint)
    encoder.tokenizer.save_pretrained(checkpoint)
    found, missing = [*in_torch(model, inputs.compiled), *exported(export_inputs, directory / "ours")], []
    for name, tools in TOOLS.items():
        for tool in tools if name in inputs.tools else ():
            try:
                found.append(exported_by(tool, inputs.tools[name], checkpoint, directory / tool.name))
            except Unsupported as problem:
                missing.append(str(problem))
        if name not in inputs.tools:
            missing.append(f"{' and '.join(tool.name for tool in tools)}: no --{name} was given")
    return [*found, engine(encoder, delta)], missing


def check(models: Sequence[Model], batches: Batches) -> None:
    """Raises VerificationError where a contender does not compute what torch does: its speed would say nothing."""
    arrays = batches.arrays[0]
    expected = models[0].logits(arrays)
    for model in models[1:]:
        found = model.logits(arrays)
        off = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        if not off <= model.off:
            raise VerificationError(
                f"{model.name} differs from {models[0].name} by {off:.1e} of its norm (allowed {model.off:.0e}) on "
                f"{batches.name}; nothing was timed"
            )


def accuracies_of(encoder: Encoder, inputs: Inputs, models: Sequence[Model]) -> dict[str, Accuracy]:
    """By name; of all but the compiled model, which would compile for hours what eager torch answers the same."""
    if inputs.task is None or not inputs.examples:
        return {}
    gold = Gold(encoder, inputs.task, inputs.examples, models[0])
    return {model.name: gold.accuracy(model) for model in models if model.name != COMPILED}


def export_times(encoder: Encoder, delta: Delta, directory: Path) -> tuple[dict[str, float], dict[str, bool]]:
    """Median seconds from an encoder and a delta in memory to a file on disk, by form; whether all were the same."""
    seconds, same = {}, {}
    for name, (unpad, precision, opset) in FORMS.items():
        taken, made = [], set[str]()
        for _ in range(EXPORTS):
            started = time.perf_counter()
            parts = ExportInputs.of(encoder, delta, True, precision)
            save(emit(parts, opset, unpad, precision), directory / "again.onnx")
            taken.append(time.perf_counter() - started)
            made.add(hashlib.sha256((directory / "again.onnx").read_bytes()).hexdigest())
        seconds[name], same[name] = median(taken), len(made) == 1
    return seconds, same


@dataclass(frozen=True)
class Work:
    """A model on all batches of a kind."""

    name: str
    run: Callable[[], None]


def work(model: Model, batches: Batches) -> Work:
    """What is timed of a model."""

    def run() -> None:
        for arrays in batches.arrays:
            model.logits(arrays)

    return Work(model.name, run)


def _timed(models: Sequence[Model], batches: Batches, rounds: int, say: Callable[[str], None]) -> list[Timed]:
    say(f"{batches.name}: {batches.sequences} sequences, fill {batches.fill:.2f}, {rounds} rounds")
    return interleave([work(model, batches) for model in models], rounds)
