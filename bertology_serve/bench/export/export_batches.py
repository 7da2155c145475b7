"""Batches that forms of a model are timed on: full ones of a fixed shape, and real texts as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.samples import Case, Texts
from bertology_serve.tasks.spec import Encoding

Arrays = dict[str, NDArray[np.int64]]
FULL = ((8, 128), (32, 64))
TOGETHER = 32
"""Texts in a batch of those that come as they are."""


@dataclass(frozen=True)
class Batches:
    """Padded batches that are run one after the other: int64 arrays [B, L] by input name."""

    name: str
    arrays: tuple[Arrays, ...]

    @property
    def fill(self) -> float:
        """The share of what is computed without unpadding that is tokens."""
        return self.tokens / sum(one["attention_mask"].size for one in self.arrays)

    @property
    def tokens(self) -> int:
        """Tokens in all batches."""
        return int(sum(one["attention_mask"].sum() for one in self.arrays))

    @property
    def sequences(self) -> int:
        """Sequences in all batches."""
        return sum(len(one["input_ids"]) for one in self.arrays)


def full(encoder: Encoder, rows: int, columns: int) -> Batches:
    """One batch without padding, of sentences cut to ``columns`` tokens."""
    texts = Texts(encoder.tokenizer)
    case = Case(tuple(texts.encoding(columns) for _ in range(rows)), columns, left=False)
    return Batches(f"{rows}×{columns}, full", (case.arrays(_pad(encoder)),))


def as_they_come(encoder: Encoder, name: str, encodings: Sequence[Encoding]) -> Batches:
    """Sequences in their own order, 32 a batch, each batch padded on the right to its longest."""
    groups = [tuple(encodings[at : at + TOGETHER]) for at in range(0, len(encodings), TOGETHER)]
    cases = [Case(group, max(map(len, group)), left=False) for group in groups]
    return Batches(name, tuple(case.arrays(_pad(encoder)) for case in cases))


def _pad(encoder: Encoder) -> int:
    return encoder.tokenizer.pad_token_id or 0
