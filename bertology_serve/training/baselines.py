"""What a delta has to beat: answers that need no training, measured on the same records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import BASE, Pipeline, Request
from bertology_serve.tasks.base import Task
from bertology_serve.tasks.spec import EMBEDDING, REGRESSION
from bertology_serve.training.batches import Item

CONSTANT, COSINE, PROBE = "constant", "cosine", "probe"


def baselines(encoder: Encoder, task: Task, items: Sequence[Item], dev: Sequence[Item]) -> dict[str, dict[str, float]]:
    """The dev metrics of each baseline that the task has, by its name.

    ``constant``: the training data's most frequent label, or mean score, for every text. ``cosine``: for scored pairs
    the cosine of their embeddings by the untouched encoder.
    """
    examples: list[Any] = [item.example for item in dev]
    found = {}
    prior = task.prior([task.target(item.example, item.encodings) for item in items])  # unweighted
    if prior is not None:
        found[CONSTANT] = task.metrics([task.decode(item.example, item.encodings, [prior]) for item in dev], examples)
    if task.kind in (REGRESSION, EMBEDDING) and all(example.text_pair is not None for example in examples):
        pipeline = Pipeline(encoder)
        pairs = ({"text": example.text, "text_pair": example.text_pair} for example in examples)
        answers = [dict(found.answer) for found in pipeline.answer(Request(BASE, pair) for pair in pairs)]
        found[COSINE] = pipeline.base.task.metrics(answers, examples)
    return found
