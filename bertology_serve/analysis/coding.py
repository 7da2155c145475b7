"""Minimum description length of labels given features: the online code (Voita and Titov 2020, arXiv 2003.12298).

Labels are sent in blocks. The first is coded uniformly; each further one by a probe trained on all blocks before it.
What is easy to read is learnt from few examples and costs few bits.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.analysis.logistic import fit

SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
FEWEST = 16  # examples of the first block
STEPS = 50  # of each probe's solver: what is left to gain by more is far below what the labels cost


def online_code(x: Tensor, y: Tensor, classes: int, penalty: float, seed: int) -> float:
    """Bits for all labels y [n] given x [n, H]; the order is drawn from the seed."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    ends = block_ends(len(y))
    bits = ends[0] * math.log2(classes)
    for start, end in pairwise(ends):
        logits = fit(x[:start], y[:start], classes, penalty, STEPS).logits(x[start:end])
        bits += F.cross_entropy(logits.double(), y[start:end], reduction="sum").item() / math.log(2)
    return bits


def block_ends(count: int) -> list[int]:
    """Where the blocks of so many examples end, the last at their end."""
    ends = [round(share * count) for share in SHARES]
    return sorted({end for end in ends if end >= min(FEWEST, count)})
