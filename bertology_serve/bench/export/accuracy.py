"""What a form costs in accuracy: the task's metric, decisions, embeddings, and what neighbours change in an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertology_serve.bench.export.export_batches import Arrays, Batches, as_they_come
from bertology_serve.bench.export.export_contenders import Logits, Model, encodings_of, exported
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.samples import Reference
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import EMBEDDING, TaskSpec

TWICE = 4
"""Every so many sequences of a batch are run alone too."""


@dataclass(frozen=True)
class Accuracy:
    """``metrics`` as fractions, ``agreement`` the share of decisions that are torch's, ``largest`` max |Δ logit|."""

    metrics: Mapping[str, float]
    agreement: float
    largest: float


@dataclass(frozen=True)
class Closeness:
    """Of mean-pooled embeddings of unit length: the cosine with torch's, on average and at worst; ``neighbours`` is the
    largest change of a component when a sequence is run alone."""

    mean: float
    worst: float
    neighbours: float


class Gold:
    """Labelled examples, and torch's logits for them."""

    def __init__(self, encoder: Encoder, task: Task, examples: Sequence[Any], eager: Model) -> None:
        self.task, self.examples = task, examples
        self.encodings = [task.encode(example, encoder.tokenizer) for example in examples]
        self.batches = as_they_come(encoder, "gold", [one for record in self.encodings for one in record])
        self.expected = self._logits(eager)

    def accuracy(self, model: Model) -> Accuracy:
        """The model on every example, in batches of 32 as they come."""
        logits = self._logits(model)
        answers = [
            self.task.decode(example, encodings, [torch.from_numpy(row)])
            for example, encodings, row in zip(self.examples, self.encodings, logits, strict=True)
        ]
        same = logits.argmax(-1) == self.expected.argmax(-1)
        return Accuracy(
            self.task.metrics(answers, self.examples), float(same.mean()), float(np.abs(logits - self.expected).max())
        )

    def _logits(self, model: Model) -> Logits:
        return np.concatenate([model.logits(arrays) for arrays in self.batches.arrays])


def closeness(
    encoder: Encoder, delta: Delta, export_inputs: ExportInputs, batches: Batches, directory: Path
) -> dict[str, Closeness]:
    """Of every form, with the task's head taken away; by the form's name."""
    task = TaskSpec(EMBEDDING, head="none", pooling="mean", max_length=delta.task.max_length)
    reference = Reference(encoder, replace(delta, task=task, head={}))
    bare = replace(export_inputs, task=task, head=Head([]))
    expected = [np.stack([row.numpy() for row in reference.outputs(encodings_of(one))]) for one in batches.arrays]
    return {model.name: _closeness(model, batches, expected) for model in exported(bare, directory)}


def _closeness(model: Model, batches: Batches, expected: Sequence[Logits]) -> Closeness:
    cosines, changes = list[float](), [0.0]
    for arrays, theirs in zip(batches.arrays, expected, strict=True):
        found = model.logits(arrays)
        cosines += (found * theirs).sum(1).tolist()
        for row in range(0, len(found), TWICE):
            changes.append(float(np.abs(model.logits(_alone(arrays, row))[0] - found[row]).max()))
    return Closeness(float(np.mean(cosines)), float(np.min(cosines)), max(changes))


def _alone(arrays: Arrays, row: int) -> Arrays:
    """One sequence without its batch and padding."""
    tokens = int(arrays["attention_mask"][row].sum())
    return {name: array[row : row + 1, :tokens] for name, array in arrays.items()}
