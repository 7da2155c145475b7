"""Where a delta of few rows begins: texts of one label are brought together before there is a head.

SetFit's idea (Tunstall et al. 2022, arXiv 2209.11055), for a delta instead of the whole encoder, and over all pairs of
a batch at once: the cosine of two texts' rows is to be 1 where they have the same label, else 0. A few rows make many
pairs, and unlike a head, which soon knows them by heart, pairs go on saying what the features lack. The head is then
solved on the rows as the delta leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from bertology_serve.encoder.batch import read_rows
from bertology_serve.encoder.trainable import TrainableDelta, trained
from bertology_serve.tasks.base import Item, Task
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.heads import aggregate
from bertology_serve.tasks.logistic import Logistic
from bertology_serve.training.batches import Sampler, micro_batches
from bertology_serve.training.frozen_rows import pooled
from bertology_serve.training.methods import factor, make_optimizer, set_rate
from bertology_serve.training.probe_solver import set_head
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import add_gradient, autocast, rounding

STEPS, BATCH, WARMUP = 24, 64, 0.1
LEAST, TOKENS = 8, 8192
"""A batch of long texts is cut at so many tokens, though not below so many texts: long texts would take minutes."""
INVERSE_PENALTY = 1.0
"""C of the logistic regression that the head is: as the rows were trained on the same labels, folds of them say
nothing about it."""


def bring_together(live: TrainableDelta, task: Task, items: Sequence[Item], config: TrainConfig) -> None:
    """Trains the live delta of a classification for ``STEPS`` steps, and solves its linear head.

    It takes its own random numbers, so that it is the same in a fleet. The delta is left in eval mode.
    """
    assert isinstance(task, LabelTask)
    device, gold = live.encoder.device, task.rows([item.target for item in items])
    label_of = {id(item): label for item, label in zip(items, gold.argmax(1).tolist(), strict=True)}
    sampler, optimizer, parameters = Sampler(len(items), config.optim.seed), make_optimizer(live, config), trained(live)

    def run(group: Sequence[Item]) -> Tensor:
        encodings = [one for item in group for one in item.encodings]
        with autocast(config.machine.precision, live.encoder):
            hidden, batch = live.hidden(encodings)
            return aggregate(read_rows(hidden, batch, batch.places, live.task), encodings, live.task)

    def loss(rows: Tensor, group: Sequence[Item]) -> Tensor:
        return pair_loss(rows, torch.tensor([label_of[id(item)] for item in group], device=device))

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.optim.seed)
        live.train()
        for step in range(STEPS):
            set_rate(optimizer, factor(step, STEPS, WARMUP, "linear"))
            batch = _cut([items[i] for i in sampler.take(BATCH)])
            groups = micro_batches(batch, config.machine.max_tokens, not live.encoder.packs)
            with rounding(config.machine.precision, live.encoder):
                add_gradient(groups, run, loss, device)
            clip_grad_norm_(parameters.values(), config.optim.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    live.eval()
    depth = live.encoder.anatomy.layers
    rows = pooled(live, items, (depth,), config.machine.max_tokens)[depth]
    set_head(live, Logistic(rows, gold).solve(INVERSE_PENALTY))


def _cut(batch: Sequence[Item]) -> Sequence[Item]:
    """The first texts of a batch, as many as its tokens allow."""
    ends = accumulate(item.tokens for item in batch)
    return batch[: max(LEAST, sum(end <= TOKENS for end in ends))]


def pair_loss(rows: Tensor, labels: Tensor) -> Tensor:
    """rows [N, H], labels [N] -> the mean squared distance of the cosine to 1 over pairs of one label, and to 0 over
    pairs of two; each part 0 where the batch has no such pair.
    """
    unit = F.normalize(rows.float(), dim=-1)
    cosines, same = unit @ unit.T, labels[:, None] == labels
    apart = ~same
    same = same & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    near, far = ((1 - cosines).square()[same], cosines.square()[apart])
    return near.sum() / max(1, len(near)) + far.sum() / max(1, len(far))
