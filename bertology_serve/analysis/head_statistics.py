"""What heads do, gathered as batches pass: sums over attention rows, divergences between heads, maps between words.

Definitions after Clark et al. 2019 (arXiv 1906.04341), for a row i (a text token, [CLS] and [SEP] included) whose
attention over the keys j is a_ij: entropy -Σ a_ij log2 a_ij in bits; distance Σ a_ij |i-j| / Σ a_ij over text keys, in
tokens; shares of a_ij on [CLS], on [SEP], on j = i+1 (0 for the last row), j = i-1 (0 for the first), j = i, and on
the virtual rows of a prompt or prefix. Each statistic is the mean over all rows of the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from bertology_serve.analysis.subject_model import text_rows
from bertology_serve.encoder.attention import Group
from bertology_serve.encoder.batch import PackedBatch

TITLES = {
    "entropy": "entropy",
    "distance": "mean distance",
    "cls": "on [CLS]",
    "sep": "on [SEP]",
    "next": "on the next token",
    "previous": "on the previous token",
    "same": "on the same token",
    "virtual": "on virtual rows",
}
STATISTICS = tuple(TITLES)
UNITS = dict.fromkeys(STATISTICS, "share of attention") | {"entropy": "bits", "distance": "tokens"}


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ scale + mask) [count, heads, length, keys]; boolean masks are true where a row may look."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


class HeadStatistics:
    """Takes the place of torch's attention (see ``forward_context.Heads``) and adds up what each head attends to.

    ``sums`` [L, heads, statistics] float64, ``rows`` how many rows they hold. Maps of the ``chosen`` packed sequences
    stay in ``kept`` until the next batch: one [heads, rows, keys] a layer.
    """

    def __init__(self, layers: int, heads: int, cls_id: int | None, sep_id: int | None) -> None:
        self.sums = torch.zeros(layers, heads, len(STATISTICS), dtype=torch.float64)
        self.rows = 0
        self.specials = (cls_id, sep_id)

    def begin(self, batch: PackedBatch, chosen: frozenset[int] = frozenset()) -> None:
        """What is to come, before each pass."""
        self.batch, self.chosen = batch, chosen
        self.kept: dict[int, list[Tensor]] = {sequence: [] for sequence in chosen}
        self.rows += sum(batch.text_lengths)
        self.texts = text_rows(batch)

    def __call__(
        self, layer: int, group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        attention = attention_map(q, k, mask, scale)
        first = group.sequences[0]
        text = self.texts[first] - self.batch.starts[first]  # the same in the whole group: one delta, one length
        rows = attention[:, :, text]
        self.sums[layer, : q.shape[1]] += self._statistics(rows, group, text + k.shape[2] - group.length).cpu()
        for i, sequence in enumerate(group.sequences):
            if sequence in self.chosen:
                self.kept[sequence].append(rows[i])
        return attention @ v

    def means(self) -> Tensor:
        """[L, heads, statistics] float64."""
        return self.sums / max(1, self.rows)

    def _statistics(self, rows: Tensor, group: Group, keys: Tensor) -> Tensor:
        """Sums [heads, statistics] over the rows [count, heads, n, keys] of a group."""
        text = rows[..., keys]
        mass = text.sum(-1)
        at = torch.arange(keys.numel(), device=rows.device)
        distance = (text * (at[:, None] - at[None, :]).abs()).sum(-1) / mass
        entropy = torch.special.entr(rows).sum(-1) / torch.log(torch.tensor(2.0))
        ids = torch.stack([self.batch.ids[self.texts[sequence]] for sequence in group.sequences])
        special = [(text * (ids == (-1 if id is None else id))[:, None, None]).sum(-1) for id in self.specials]
        diagonals = [text.diagonal(offset, -2, -1) for offset in (1, -1, 0)]
        columns = [entropy, distance, *special, *diagonals, 1.0 - mass]
        return torch.stack([column.double().sum((0, 2)) for column in columns], -1)


class Divergences:
    """Mean Jensen-Shannon divergence, in bits, of every two heads' attention over the rows seen (Clark et al. 2019).

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2, between 0 and 1.
    """

    def __init__(self, heads: int) -> None:
        self.sums = torch.zeros(heads, heads, dtype=torch.float64)
        self.rows = 0

    def add(self, maps: Iterable[Tensor]) -> None:
        """The maps [heads, n, keys] of each layer for the same n rows."""
        attention = torch.cat(list(maps))  # [all heads, n, keys]
        entropies = torch.special.entr(attention).sum(-1)  # [all heads, n]
        for head in range(len(attention) - 1):
            mixed = torch.special.entr((attention[head] + attention[head + 1 :]) / 2).sum(-1)
            apart = mixed - (entropies[head] + entropies[head + 1 :]) / 2
            self.sums[head, head + 1 :] += apart.double().sum(-1).cpu()
        self.rows += attention.shape[1]

    def means(self) -> np.ndarray:
        """[heads, heads], symmetric, zero on the diagonal."""
        half = self.sums.clamp(min=0) / (max(1, self.rows) * math.log(2))
        return (half + half.T).numpy()


def clusters(distances: np.ndarray, count: int) -> list[int]:
    """Average-linkage clusters of points, given their distances [n, n]: a number each, the largest cluster is 0."""
    between = distances.astype(float).copy()
    np.fill_diagonal(between, np.inf)
    members: dict[int, list[int]] = {i: [i] for i in range(len(distances))}
    while len(members) > max(1, count):
        i, j = sorted(divmod(int(np.argmin(between)), len(between)))
        a, b = len(members[i]), len(members[j])
        between[i] = between[:, i] = (a * between[i] + b * between[j]) / (a + b)
        between[j] = between[:, j] = between[i, i] = np.inf
        members[i] += members.pop(j)
    labels = [0] * len(distances)
    for number, cluster in enumerate(sorted(members.values(), key=lambda points: (-len(points), min(points)))):
        for point in cluster:
            labels[point] = number
    return labels


def flat_map(distances: np.ndarray) -> np.ndarray:
    """Classical multidimensional scaling: points [n, 2] whose distances come near those given."""
    n = len(distances)
    centre = np.eye(n) - 1.0 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ np.square(distances) @ centre)
    points = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    signs = np.sign(points[np.abs(points).argmax(0), range(points.shape[1])])
    return points * np.where(signs == 0, 1, signs)  # type: ignore[no-any-return]


class TextMaps:
    """Takes the place of torch's attention (see ``forward_context.Heads``) and keeps every map of one batch.

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
