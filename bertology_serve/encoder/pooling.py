"""From hidden rows to a head's output: which rows a delta's head reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bertology_serve.encoder.batch import PackedBatch
from bertology_serve.tasks.heads import Dense, Head, head_form, pool
from bertology_serve.tasks.spec import TaskSpec


def read(hidden: Tensor, batch: PackedBatch, sequences: Sequence[int], task: TaskSpec, head: Head) -> Tensor:
    """The head's output for packed sequences, in the order given.

    hidden [T, H]. Returns [S, C], for tasks that answer for every token [sum of text lengths, C], for embeddings
    [S, H]; in the head's own precision, float32 unless it was moved.
    """
    rows = read_rows(hidden, batch, sequences, task)
    own = next((parameter.dtype for parameter in head.parameters()), torch.float32)
    return head(rows.to(own))  # type: ignore[no-any-return]


def read_rows(hidden: Tensor, batch: PackedBatch, sequences: Sequence[int], task: TaskSpec) -> Tensor:
    """The rows that a task's head reads: [S, H] pooled, or for tasks that answer for every token all of the text."""
    if not task.per_token and task.pooling == "cls":
        return hidden[batch.first_rows[list(sequences)]]
    texts = torch.split(batch.text_rows, list(batch.text_lengths))
    rows = torch.cat([texts[i] for i in sequences])
    if task.per_token:
        return hidden[rows]
    lengths = torch.tensor([batch.text_lengths[i] for i in sequences], device=hidden.device)
    return pool(hidden, rows, lengths, task.pooling)


def form_for(encoder: Any, task: TaskSpec) -> tuple[Dense, ...]:
    """The head's form for an encoder's family and a task."""
    anatomy = encoder.anatomy
    return head_form(anatomy.family, anatomy.prefix, task, anatomy.hidden, encoder.config.to_dict())
