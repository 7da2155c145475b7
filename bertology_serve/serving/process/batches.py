"""A batch as numbers: what goes through shared memory to the executor's process, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertology_serve.deltas.delta import Delta
from bertology_serve.serving.process.arena import Arena
from bertology_serve.serving.process.frames import Lost
from bertology_serve.tasks.spec import EMBEDDING, Encoding

Owned = tuple[int, Encoding]  # the number of a sequence's delta in the batch's list of keys, and its tokens


def put_batch(arena: Arena, owned: Sequence[Owned]) -> tuple[int, int]:
    """Writes S owners, S lengths, T ids and T types, int32; returns (S, T)."""
    lengths = [len(encoding) for _, encoding in owned]
    columns = (
        [owner for owner, _ in owned],
        lengths,
        [number for _, encoding in owned for number in encoding.ids],
        [number for _, encoding in owned for number in encoding.types],
    )
    arena.write([np.array(column, dtype=np.int32) for column in columns])
    return len(owned), sum(lengths)


def take_batch(arena: Arena, sequences: int, tokens: int) -> list[Owned]:
    """What ``put_batch`` wrote; Lost where it is no such batch."""
    numbers = arena.read(2 * (sequences + tokens), np.int32).tolist()
    owners, lengths = numbers[:sequences], numbers[sequences : 2 * sequences]
    if min(lengths, default=0) < 0 or sum(lengths) != tokens:
        raise Lost(f"sequences of {sum(lengths)} tokens; expected {tokens}")
    ids, types = numbers[2 * sequences : 2 * sequences + tokens], numbers[2 * sequences + tokens :]
    found, at = [], 0
    for owner, length in zip(owners, lengths, strict=True):
        found.append((owner, Encoding(tuple(ids[at : at + length]), tuple(types[at : at + length]))))
        at += length
    return found


def put_outputs(arena: Arena, outputs: Sequence[Tensor]) -> int:
    """Writes the numbers of all outputs, float32; returns how many."""
    flat = torch.cat([output.reshape(-1) for output in outputs])
    arena.write([flat.to(torch.float32).numpy()])
    return flat.numel()


def take_outputs(arena: Arena, count: int, owned: Sequence[tuple[Delta, Encoding]], hidden: int) -> list[Tensor]:
    """Each sequence's output, [C], [len, C] or [H] as its delta's task has it; Lost where the numbers are others."""
    shapes = [shape_of(delta, encoding, hidden) for delta, encoding in owned]
    sizes = [int(np.prod(shape)) for shape in shapes]
    if count != sum(sizes):
        raise Lost(f"{count} numbers came back; expected {sum(sizes)}")
    numbers: NDArray[np.generic] = arena.read(count, np.float32)
    parts = torch.split(torch.from_numpy(numbers.copy()), sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def shape_of(delta: Delta, encoding: Encoding, hidden: int) -> tuple[int, ...]:
    """The shape of a sequence's output."""
    task = delta.task
    if task.kind == EMBEDDING:
        return (hidden,)
    return (len(encoding), task.outputs) if task.per_token else (task.outputs,)
