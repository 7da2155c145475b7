"""Which hidden rows are read: by a delta's head, and layer by layer by whoever asks what each layer holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bertology_serve.encoder.bank import Entry
from bertology_serve.encoder.batch import PackedBatch, pack
from bertology_serve.encoder.forward_context import Pools
from bertology_serve.tasks.heads import Dense, Head, head_form, pool
from bertology_serve.tasks.spec import Encoding, TaskSpec

if TYPE_CHECKING:
    from bertology_serve.encoder.encoder import Encoder


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


def form_for(encoder: Encoder, task: TaskSpec) -> tuple[Dense, ...]:
    """The head's form for an encoder's family and a task."""
    anatomy = encoder.anatomy
    return head_form(anatomy.family, anatomy.prefix, task, anatomy.hidden, encoder.config.to_dict())


def layer_rows(
    encoder: Encoder, pools: Pools, entry: Entry, encodings: Sequence[Encoding], groups: Iterable[Sequence[int]],
    layers: Sequence[int],
) -> Iterator[tuple[Sequence[int], PackedBatch, dict[int, Tensor]]]:  # fmt: skip
    """For each group of sequences (numbers of ``encodings``) its batch, and by layer the hidden rows [T, H].

    Layer 0 is what the embeddings put out, the last what the encoder does; ``entry`` is the delta of all sequences.
    ``batch.order[i]`` is the place in the group of packed sequence i. Raises Unsupported for other layers than the
    last where layers share their weights.
    """
    depth = encoder.anatomy.layers
    for members in groups:
        own = [encodings[i] for i in members]
        batch = pack(own, [entry] * len(own), encoder.anatomy, encoder.device, padded=not encoder.packs)
        if set(layers) == {depth}:
            yield members, batch, {depth: encoder.run(batch, pools)}
        else:
            found = encoder.layers(batch, pools)
            yield members, batch, {layer: found[layer] for layer in layers}
