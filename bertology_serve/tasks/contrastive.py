"""Losses over a batch of embeddings: texts that belong together come near, others move apart.

Each takes rows [S, W], for every target in turn those of its text, its pair and its negatives, and is a mean over the
targets (or over what they compare). Similarity is the cosine, times 20 wherever it is compared with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 20.0


class Target(NamedTuple):
    """What an example's rows are to be: ``score`` says how alike text and pair are, ``scores`` what a teacher gives the
    pair and each negative; ``texts``, a number a row, tells which are the same. ``loss`` is a name of ``LOSSES``.
    """

    texts: tuple[int, ...]
    score: float | None = None
    scores: tuple[float, ...] = ()
    loss: str = ""


class Batch:
    """Rows by what they are: anchors [N, W], and candidates [M, W], the pairs and negatives of all; unit length."""

    def __init__(self, rows: Tensor, targets: Sequence[Target]) -> None:
        unit = F.normalize(rows, dim=-1)
        sizes = [len(target.texts) for target in targets]
        self.counts = [size - 1 for size in sizes]
        ends = torch.tensor(sizes, device=rows.device).cumsum(0)
        firsts = ends - ends.new_tensor(sizes)
        others = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill(0, firsts, False)
        self.anchors, self.candidates = unit[firsts], unit[others]
        self.pairs = firsts - torch.arange(len(sizes), device=rows.device)  # each target's pair among the candidates
        self.texts = torch.tensor([text for target in targets for text in target.texts], device=rows.device)
        self.own_texts, self.other_texts = self.texts[firsts], self.texts[others]

    def own(self) -> Tensor:
        """[M]: the cosine of each candidate with the anchor of its own target."""
        repeats = torch.tensor(self.counts, device=self.anchors.device)
        return (self.anchors.repeat_interleave(repeats, 0) * self.candidates).sum(-1)

    def known(self) -> Tensor:
        """[N, M]: candidates that are no negatives, since the batch says that they belong to such an anchor too."""
        same_anchor = (self.own_texts[:, None] == self.own_texts).float()
        same_pair = (self.other_texts[self.pairs][:, None] == self.other_texts).float()
        found = (same_anchor @ same_pair).bool()
        return found.index_put((torch.arange(len(found), device=found.device), self.pairs), found.new_tensor(False))


def cosent(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """CoSENT (Su 2022, https://kexue.fm/archives/8847): ``log(1 + Σ exp(20 (cos_i - cos_j)))`` over all couples of
    pairs of which j has the higher score. Only the order of scores matters; a single pair teaches nothing.
    """
    batch = Batch(rows, targets)
    cosine = SHARPNESS * batch.own()[batch.pairs]
    gold = cosine.new_tensor([target.score for target in targets])
    wrong = (cosine[:, None] - cosine[None, :])[gold[:, None] < gold[None, :]]
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)


def mnrl(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017, arXiv 1705.00652): the anchor's pair among those, and the
    negatives, of all the batch. What the batch itself says belongs to the anchor is not taken for a negative.
    """
    return F.cross_entropy(*_ranking(Batch(rows, targets)))


def mnrl_symmetric(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """Half of that, and half of the way back: the pair's anchor among all anchors."""
    batch = Batch(rows, targets)
    table, pairs = _ranking(batch)
    back = table[:, pairs].T
    return (F.cross_entropy(table, pairs) + F.cross_entropy(back, torch.arange(len(back), device=back.device))) / 2


def _ranking(batch: Batch) -> tuple[Tensor, Tensor]:
    """[N, M] similarities, and the place of each anchor's own pair."""
    table = SHARPNESS * batch.anchors @ batch.candidates.T
    return table.masked_fill(batch.known(), -torch.inf), batch.pairs


def margin_mse(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """Margin-MSE (Hofstätter et al. 2020, arXiv 2010.02666): by how much the pair is above each negative, as a teacher
    has it.
    """
    batch = Batch(rows, targets)
    margins = [part[0] - part[1:] for part in torch.split(SHARPNESS * batch.own(), batch.counts)]
    gold = [target.scores[0] - score for target in targets for score in target.scores[1:]]
    found = torch.cat(margins)
    return F.mse_loss(found, found.new_tensor(gold))


def distill(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """A teacher's scores of pair and negatives as a distribution (KL divergence); a pair's one score as its cosine
    (squared error).
    """
    batch = Batch(rows, targets)
    own, losses = batch.own(), []
    for part, target in zip(torch.split(own, batch.counts), targets, strict=True):
        if target.scores:
            gold = F.softmax(part.new_tensor(target.scores), 0)
            losses.append(F.kl_div(F.log_softmax(SHARPNESS * part, 0), gold, reduction="sum"))
        else:
            losses.append((part[0] - float(target.score or 0.0)) ** 2)
    return torch.stack(losses).mean()


COSENT, MNRL, MARGIN_MSE, DISTILL = "cosent", "mnrl", "margin-mse", "distill"
LOSSES: Mapping[str, Callable[[Tensor, Sequence[Target]], Tensor]] = {
    COSENT: cosent, MNRL: mnrl, "mnrl-symmetric": mnrl_symmetric, MARGIN_MSE: margin_mse, DISTILL: distill,
}  # fmt: skip
