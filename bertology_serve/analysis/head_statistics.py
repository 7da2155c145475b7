"""Sums over attention rows, head by head, gathered as batches pass: no map outlives its batch.

Definitions after Clark et al. 2019 (arXiv 1906.04341), for a row i (a text token, [CLS] and [SEP] included) whose
attention over the keys j is a_ij: entropy -Σ a_ij log2 a_ij in bits; distance Σ a_ij |i-j| / Σ a_ij over text keys, in
tokens; shares of a_ij on [CLS], on [SEP], on j = i+1 (0 for the last row), j = i-1 (0 for the first), j = i, and on
the virtual rows of a prompt or prefix. Each statistic is the mean over all rows of the corpus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertology_serve.analysis.subject import text_rows
from bertology_serve.encoder.attention import Group
from bertology_serve.encoder.packing import PackedBatch

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
    """Takes the place of torch's attention (see ``passing.Heads``) and adds up what each head attends to.

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
