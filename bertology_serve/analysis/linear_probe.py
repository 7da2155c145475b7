"""Linear probes: the features that they read, their fit and scores, a mix of layers, and the online code (MDL)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.analysis.subject_model import Advance, Subject, silent, text_rows
from bertology_serve.tasks.heads import pool
from bertology_serve.tasks.logistic import LOOSE, Logistic, Solution
from bertology_serve.tasks.spec import Encoding


@dataclass(frozen=True)
class Features:
    """``texts`` [L + 1, sequences, H] pooled, ``words`` [L + 1, wanted rows, H]; float32 on the CPU, layer 0 embeds."""

    texts: Tensor
    words: Tensor


@torch.inference_mode()
def gather(
    subject: Subject,
    encodings: Sequence[Encoding],
    wanted: Sequence[Sequence[int]],
    pooling: str = "mean",
    max_tokens: int = 4096,
    advance: Advance = silent,
) -> Features:
    """Features of each sequence, and of its ``wanted`` rows (numbers within the text), in the order given."""
    anatomy = subject.encoder.anatomy
    firsts = [0]
    for rows in wanted:
        firsts.append(firsts[-1] + len(rows))
    texts = torch.empty(anatomy.layers + 1, len(encodings), anatomy.hidden)
    words = torch.empty(anatomy.layers + 1, firsts[-1], anatomy.hidden)
    done = 0
    for members, batch, layers in subject.passes(encodings, max_tokens):
        owners = [members[original] for original in batch.order]
        lengths = torch.tensor(batch.text_lengths, device=batch.ids.device)
        chosen = [own[list(wanted[i])] for i, own in zip(owners, text_rows(batch), strict=True)]
        places = torch.cat([torch.arange(firsts[i], firsts[i + 1]) for i in owners])
        for layer, hidden in layers.items():
            texts[layer, owners] = pool(hidden, batch.text_rows, lengths, pooling).float().cpu()
            words[layer, places] = hidden[torch.cat(chosen)].float().cpu()
        done += len(members)
        advance(done, len(encodings))
    return Features(texts, words)


CLOSE = 1e-5  # of each probe's gradient: what is left to gain is below what a probe's scores show


def fit(x: Tensor, y: Tensor, classes: int, penalty: float, tolerance: float = CLOSE) -> Solution:
    """Minimises mean cross-entropy + penalty / 2 ‖W‖² over standardised features: no seed, the same answer every time.

    x [n, H], y [n] int64 below ``classes``. Features without variance get a standard deviation of 1.
    """
    rows_of_w = 2.0 if classes == 2 else 1.0  # the solver penalises the one vector w, of which W holds two halves
    return Logistic(x, F.one_hot(y, classes).double(), by_feature=True).solve(
        rows_of_w / (penalty * len(x)), tolerance=tolerance
    )


@dataclass(frozen=True)
class ProbeScore:
    """``accuracy`` and ``macro_f1`` as fractions, ``bits``: mean cross-entropy."""

    accuracy: float
    macro_f1: float
    bits: float


def score(probe: Solution, x: Tensor, y: Tensor) -> ProbeScore:
    """How a probe does on x [n, H] with the right classes y [n]; F1 over the classes that occur or are answered."""
    logits = probe.logits(x)
    found = logits.argmax(1)
    classes = torch.unique(torch.cat([y, found])).tolist()
    scores = []
    for label in classes:
        hits = ((y == label) & (found == label)).sum().item()
        scores.append(2 * hits / ((y == label).sum().item() + (found == label).sum().item()))
    return ProbeScore(
        accuracy=(found == y).double().mean().item(),
        macro_f1=sum(scores) / len(scores),
        bits=F.cross_entropy(logits, y).item() / math.log(2),
    )


@dataclass(frozen=True)
class Mix:
    """``weights`` [L + 1] of the layers, of sum 1; ``accuracy`` of the probe on held-out rows."""

    weights: Tensor
    accuracy: float

    @property
    def centre(self) -> float:
        """The mean layer, weighted."""
        return float((self.weights * torch.arange(len(self.weights))).sum())


def fit_mix(x: Tensor, y: Tensor, held: Tensor, gold: Tensor, classes: int, penalty: float, steps: int = 40) -> Mix:
    """Learns softmax weights over layers and one linear probe together, by L-BFGS from equal weights.

    x [L + 1, n, H] and ``held`` alike, standardised layer by layer with x's statistics; y [n], ``gold`` alike, int64.
    The objective is that of ``fit``; not convex in the weights, but without any random start.
    """
    mean, std = x.mean(1, keepdim=True), x.std(1, unbiased=False, keepdim=True)
    std = torch.where(std > 1e-7, std, torch.ones_like(std))
    features, others = (x - mean) / std, (held - mean) / std
    mix = torch.zeros(len(x), dtype=x.dtype, requires_grad=True)
    weight = torch.zeros(classes, x.shape[2], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([mix, weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def logits(rows: Tensor) -> Tensor:
        return F.linear(torch.einsum("l,lnh->nh", mix.softmax(0), rows), weight, bias)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(logits(features), y) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        accuracy = (logits(others).argmax(1) == gold).double().mean().item()
    return Mix(mix.detach().softmax(0), accuracy)


SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
FEWEST = 16  # examples of the first block


def online_code(x: Tensor, y: Tensor, classes: int, penalty: float, seed: int) -> float:
    """Bits for all labels y [n] given x [n, H]; the order is drawn from the seed."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    ends = block_ends(len(y))
    bits = ends[0] * math.log2(classes)
    for start, end in pairwise(ends):
        logits = fit(x[:start], y[:start], classes, penalty, LOOSE).logits(x[start:end])
        bits += F.cross_entropy(logits, y[start:end], reduction="sum").item() / math.log(2)
    return bits


def block_ends(count: int) -> list[int]:
    """Where the blocks of so many examples end, the last at their end."""
    ends = [round(share * count) for share in SHARES]
    return sorted({end for end in ends if end >= min(FEWEST, count)})
