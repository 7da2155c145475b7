"""Examples made ready for training, and how a batch of them is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Example, Task
from bertology_serve.tasks.spec import EMBEDDING, Encoding

# The loss of embeddings compares every pair of a batch with every other: cut, it would be another loss.
WHOLE_BATCH = (EMBEDDING,)


@dataclass(frozen=True, slots=True)
class Item:
    """A labelled example, its sequences, and what the loss compares them with."""

    example: Example
    encodings: tuple[Encoding, ...]
    target: Any

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(map(len, self.encodings))

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(map(len, self.encodings))


def make_items(
    task: Task, records: Iterable[tuple[Mapping[str, Any], str]], tokenizer: PreTrainedTokenizerBase
) -> list[Item]:
    """Checks and tokenises labelled (fields, where) records once. Raises DataError naming the first that is wrong."""
    items = []
    for fields, where in records:
        example = task.example(fields, where, labelled=True)
        encodings = tuple(task.encode(example, tokenizer))
        items.append(Item(example, encodings, task.target(example, encodings)))
    if not items:
        raise DataError("no records were found; expected at least one")
    return items


def micro_batches(items: Sequence[Item], max_tokens: int, padded: bool, whole: bool = False) -> list[list[Item]]:
    """Groups of items of like length, shortest first, each of at most ``max_tokens`` rows (or a single item).

    ``padded``: every sequence takes as many rows as the longest of its group. ``whole``: one group, whatever its size.
    """
    if whole:
        return [list(items)]
    groups: list[list[Item]] = []
    rows = sequences = 0
    for item in sorted(items, key=lambda item: item.longest):
        sequences += len(item.encodings)
        rows = sequences * item.longest if padded else rows + item.tokens
        if not groups or rows > max_tokens:
            groups.append([])
            sequences = len(item.encodings)
            rows = sequences * item.longest if padded else item.tokens
        groups[-1].append(item)
    return groups
