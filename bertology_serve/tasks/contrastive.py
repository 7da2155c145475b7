"""Losses over a batch of embeddings: texts that belong together come near, others move apart.

Each takes S texts, for every target in turn its text, its pair and its negatives, as their task compares them, and is a
mean over the targets (or over what they compare).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


class Target(NamedTuple):
    """What an example's rows are to be: ``score`` says how alike text and pair are, ``scores`` what a teacher gives the
    pair and each negative; ``texts``, a number a row, tells which are the same. ``loss`` is a name of ``LOSSES``,
    ``flops`` the weight of ``flops`` beside it. ``skipped`` are rows of its texts that have no vector (multi-vector).
    """

    texts: tuple[int, ...]
    score: float | None = None
    scores: tuple[float, ...] = ()
    loss: str = ""
    flops: float = 0.0
    skipped: tuple[int, ...] = ()


class Similarity(Protocol):
    """How alike S texts are. ``sharpness`` is what that is multiplied by wherever it is compared with others."""

    sharpness: float

    def table(self, ones: Tensor, others: Tensor) -> Tensor:
        """[N, M]: each of the texts with these numbers [N] as a query, beside each of others [M]."""
        ...

    def pairs(self, ones: Tensor, others: Tensor) -> Tensor:
        """[M]: the same for as many of both, one by one."""
        ...


class Products:
    """Dot products of one row a text, rows [S, W]."""

    sharpness = 1.0

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def table(self, ones: Tensor, others: Tensor) -> Tensor:
        return self.rows[ones] @ self.rows[others].T

    def pairs(self, ones: Tensor, others: Tensor) -> Tensor:
        return (self.rows[ones] * self.rows[others]).sum(-1)


class Cosines(Products):
    """Cosines of one row a text, rows [S, W]."""

    sharpness = 20.0

    def __init__(self, rows: Tensor) -> None:
        super().__init__(F.normalize(rows, dim=-1))


class MaxSims:
    """MaxSim (Khattab & Zaharia 2020, arXiv 2004.12832): for each row of a query the largest cosine with a row of the
    document, and their sum. ``rows`` [R, D] are those of all texts in order, ``lengths`` [S] how many each has.
    """

    sharpness = 1.0

    def __init__(self, rows: Tensor, lengths: Sequence[int]) -> None:
        self.texts = torch.split(F.normalize(rows, dim=-1), list(lengths))

    def table(self, ones: Tensor, others: Tensor) -> Tensor:
        documents = [self.texts[i] for i in others.tolist()]
        rows = pad_sequence(documents, batch_first=True)
        sizes = torch.tensor([len(document) for document in documents], device=rows.device)
        padding = torch.arange(rows.shape[1], device=rows.device) >= sizes[:, None]
        found = [(rows @ self.texts[i].T).masked_fill(padding[:, :, None], -torch.inf) for i in ones.tolist()]
        return torch.stack([one.amax(1).sum(-1) for one in found])

    def pairs(self, ones: Tensor, others: Tensor) -> Tensor:
        numbers = zip(ones.tolist(), others.tolist(), strict=True)
        return torch.stack([(self.texts[i] @ self.texts[j].T).amax(1).sum() for i, j in numbers])


class Candidates:
    """The numbers of texts by what they are: ``anchors`` [N], and ``candidates`` [M], all pairs and negatives."""

    def __init__(self, alike: Similarity, targets: Sequence[Target]) -> None:
        self.alike, self.counts = alike, [len(target.texts) - 1 for target in targets]
        sizes = torch.tensor([len(target.texts) for target in targets])
        self.anchors = sizes.cumsum(0) - sizes
        others = torch.ones(int(sizes.sum()), dtype=torch.bool).index_fill(0, self.anchors, False)
        self.candidates = others.nonzero().flatten()
        self.pairs = self.anchors - torch.arange(len(sizes))  # each target's pair among the candidates
        texts = torch.tensor([text for target in targets for text in target.texts])
        self.own_texts, self.other_texts = texts[self.anchors], texts[self.candidates]

    def own(self) -> Tensor:
        """[M]: how alike each candidate and the anchor of its own target are."""
        return self.alike.pairs(self.anchors.repeat_interleave(torch.tensor(self.counts)), self.candidates)

    def known(self) -> Tensor:
        """[N, M]: candidates that are no negatives, since the batch says that they belong to such an anchor too."""
        same_anchor = (self.own_texts[:, None] == self.own_texts).float()
        same_pair = (self.other_texts[self.pairs][:, None] == self.other_texts).float()
        found = (same_anchor @ same_pair).bool()
        return found.index_put((torch.arange(len(found)), self.pairs), found.new_tensor(False))


def cosent(alike: Similarity, targets: Sequence[Target]) -> Tensor:
    """CoSENT (Su 2022, https://kexue.fm/archives/8847): ``log(1 + Σ exp(20 (cos_i - cos_j)))`` over all couples of
    pairs of which j has the higher score. Only the order of scores matters; a single pair teaches nothing.
    """
    batch = Candidates(alike, targets)
    found = alike.sharpness * batch.own()[batch.pairs]
    gold = found.new_tensor([target.score for target in targets])
    wrong = (found[:, None] - found[None, :])[gold[:, None] < gold[None, :]]
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)


def mnrl(alike: Similarity, targets: Sequence[Target]) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017, arXiv 1705.00652): the anchor's pair among those, and the
    negatives, of all the batch. What the batch itself says belongs to the anchor is not taken for a negative.
    """
    return F.cross_entropy(*_ranking(Candidates(alike, targets)))


def mnrl_symmetric(alike: Similarity, targets: Sequence[Target]) -> Tensor:
    """Half of that, and half of the way back: the pair's anchor among all anchors."""
    table, pairs = _ranking(Candidates(alike, targets))
    back = table[:, pairs].T
    return (F.cross_entropy(table, pairs) + F.cross_entropy(back, torch.arange(len(back), device=back.device))) / 2


def _ranking(batch: Candidates) -> tuple[Tensor, Tensor]:
    """[N, M] similarities, and the place of each anchor's own pair."""
    table = batch.alike.sharpness * batch.alike.table(batch.anchors, batch.candidates)
    return table.masked_fill(batch.known().to(table.device), -torch.inf), batch.pairs.to(table.device)


def margin_mse(alike: Similarity, targets: Sequence[Target]) -> Tensor:
    """Margin-MSE (Hofstätter et al. 2020, arXiv 2010.02666): by how much the pair is above each negative, as a teacher
    has it.
    """
    batch = Candidates(alike, targets)
    margins = [part[0] - part[1:] for part in torch.split(alike.sharpness * batch.own(), batch.counts)]
    gold = [target.scores[0] - score for target in targets for score in target.scores[1:]]
    found = torch.cat(margins)
    return F.mse_loss(found, found.new_tensor(gold))


def distill(alike: Similarity, targets: Sequence[Target]) -> Tensor:
    """A teacher's scores of pair and negatives as a distribution (KL divergence); a pair's one score as that of the
    texts, a cosine for embeddings (squared error).
    """
    batch = Candidates(alike, targets)
    own, losses = batch.own(), []
    for part, target in zip(torch.split(own, batch.counts), targets, strict=True):
        if target.scores:
            gold = F.softmax(part.new_tensor(target.scores), 0)
            losses.append(F.kl_div(F.log_softmax(alike.sharpness * part, 0), gold, reduction="sum"))
        else:
            losses.append((part[0] - float(target.score or 0.0)) ** 2)
    return torch.stack(losses).mean()


def flops(rows: Tensor, targets: Sequence[Target]) -> Tensor:
    """How much a search costs, and with it how dense weights rows [S, V] are: ``Σ (mean w)²`` over words, of anchors
    and of candidates (Paria et al. 2020, arXiv 2004.05665).
    """
    batch = Candidates(Products(rows), targets)
    return torch.stack([rows[side].mean(0).square().sum() for side in (batch.anchors, batch.candidates)]).sum()


COSENT, MNRL, MARGIN_MSE, DISTILL = "cosent", "mnrl", "margin-mse", "distill"
LOSSES: Mapping[str, Callable[[Similarity, Sequence[Target]], Tensor]] = {
    COSENT: cosent, MNRL: mnrl, "mnrl-symmetric": mnrl_symmetric, MARGIN_MSE: margin_mse, DISTILL: distill,
}  # fmt: skip
