"""Attention between words, from attention between tokens (Clark et al. 2019, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertology_serve.analysis.head_statistics import attention_map
from bertology_serve.analysis.subject import text_rows
from bertology_serve.encoder.attention import Group
from bertology_serve.encoder.packing import PackedBatch


class TextMaps:
    """Takes the place of torch's attention (see ``passing.Heads``) and keeps every map of one batch.

    ``maps[sequence]``: a map [heads, n, n] a layer, text rows by text rows.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.batch, self.texts = batch, text_rows(batch)
        self.maps: list[list[Tensor]] = [[] for _ in range(batch.sequences)]

    def __call__(
        self, layer: int, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        attention = attention_map(q, k, mask, scale)
        for i, sequence in enumerate(group.sequences):
            text = self.texts[sequence] - self.batch.starts[sequence]
            self.maps[sequence].append(attention[i][:, text][:, :, text + k.shape[2] - group.length])
        return attention @ v


def by_words(attention: Tensor, words: Sequence[int]) -> Tensor:
    """Attention [..., n, n] between tokens -> [..., W, W] between the words that they belong to (-1: to none).

    Attention to a word is the sum over its tokens, attention from it their mean.
    """
    count = max(words, default=-1) + 1
    member = torch.zeros(len(words), count, dtype=attention.dtype, device=attention.device)
    for row, word in enumerate(words):
        if word >= 0:
            member[row, word] = 1.0
    means = member / member.sum(0).clamp(min=1.0)
    return means.T @ attention @ member
