"""What a delta has to beat: answers that need no training, measured on the same records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import BASE, Pipeline, Request
from bertology_serve.tasks.base import Answer, Item, Task
from bertology_serve.tasks.spec import CLASSIFICATION, LABEL_KINDS, REGRESSION, VECTOR_KINDS, ZERO_SHOT

CONSTANT, COSINE, NAMES, PROBE = "constant", "cosine", "label names", "probe"
_NAMED = re.compile(r"(?!label_?\d)\w*[^\W\d_]{3}", re.IGNORECASE)
Rivals = Mapping[str, tuple[Task, list[Answer]]]


def baselines(encoder: Encoder, task: Task, items: Sequence[Item], dev: Sequence[Item]) -> dict[str, dict[str, float]]:
    """The dev metrics of each of ``rivals``, by its name."""
    examples = [item.example for item in dev]
    known = rivals(encoder, task, [item.example for item in items], examples)
    return {name: other.metrics(answers, examples) for name, (other, answers) in known.items()}


def rivals(encoder: Encoder, task: Task, known: Sequence[Any], examples: Sequence[Any]) -> Rivals:
    """Answers to examples that need no training, by name, each with the task that measures them.

    ``constant``: the most frequent label of the ``known`` examples, or their mean score, for every text. By the
    untouched encoder's embeddings ``cosine``, for scored pairs, and ``label names``: the label whose name is nearest
    to the text.
    """
    found: dict[str, tuple[Task, list[Answer]]] = {}
    if task.kind in (*LABEL_KINDS, REGRESSION, ZERO_SHOT):
        prior = task.prior([task.target(example, ()) for example in known])
        if prior is not None:
            found[CONSTANT] = task, [task.decode(example, (), [prior]) for example in examples]
    if encoder.refusal:
        return found
    if task.kind in VECTOR_KINDS or (
        task.kind == REGRESSION and all(example.text_pair is not None for example in examples)
    ):
        pipeline = Pipeline(encoder)
        pairs = ({"text": example.text, "text_pair": example.text_pair} for example in examples)
        records = (example.fields for example in examples) if task.kind in VECTOR_KINDS else pairs
        answers = [dict(found.answer) for found in pipeline.answer(Request(BASE, record) for record in records)]
        found[COSINE] = pipeline.base.task, answers
    named = task.kind == CLASSIFICATION and all(map(_NAMED.match, task.spec.labels))
    if (named or task.kind == ZERO_SHOT) and not any(example.text_pair for example in examples):
        labels, texts = task.spec.labels, [example.text for example in examples]
        asked = task.beside(examples[0]) or [re.sub(r"[_\W]+", " ", label).strip() for label in labels]
        found[NAMES] = task, _nearest(encoder, labels, asked, texts)
    return found


def _nearest(encoder: Encoder, labels: Sequence[str], names: Sequence[str], texts: Sequence[str]) -> list[Answer]:
    """For each text the label whose name, as words, has the nearest embedding."""
    asked = (Request(BASE, {"text": text}) for text in (*names, *texts))
    rows = [found.answer["embedding"] for found in Pipeline(encoder).answer(asked)]
    vectors = torch.nn.functional.normalize(torch.tensor(rows), dim=1)
    table = vectors[len(labels) :] @ vectors[: len(labels)].T
    scores = [dict(zip(labels, row, strict=True)) for row in table.tolist()]
    best = [max(own, key=own.__getitem__) for own in scores]
    return [{"label": label, "score": own[label], "scores": own} for label, own in zip(best, scores, strict=True)]
