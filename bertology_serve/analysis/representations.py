"""What every layer makes of texts and words, from one pass; and linear CKA between two such sets of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bertology_serve.analysis.subject_model import Advance, Subject, silent, text_rows
from bertology_serve.tasks.heads import pool
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


class LinearCka:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, Frobenius norms, from sums that rows are added to batch by batch.

    Memory is three [H, H] float64 matrices, however many rows there are. Also gathers how far rows moved:
    ‖y - x‖ / ‖x‖, averaged over rows.
    """

    def __init__(self, width: int) -> None:
        self.products = torch.zeros(3, width, width, dtype=torch.float64)  # XᵀX, YᵀY, YᵀX
        self.sums = torch.zeros(2, width, dtype=torch.float64)
        self.rows = 0
        self.moved = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows x and y [n, H] of the two models."""
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        for product, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True):
            product += left.T @ right
        self.sums += torch.stack([x.sum(0), y.sum(0)])
        self.rows += len(x)
        self.moved += float(((y - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)).sum())

    @property
    def value(self) -> float:
        """Between 0 and 1; 1 for representations that differ by rotation, scale and shift only."""
        x, y = self.sums
        centred = [
            product - torch.outer(left, right) / self.rows
            for product, (left, right) in zip(self.products, ((x, x), (y, y), (y, x)), strict=True)
        ]
        own_x, own_y, cross = (matrix.square().sum() for matrix in centred)
        return float(cross / (own_x.sqrt() * own_y.sqrt()).clamp(min=1e-300))

    @property
    def drift(self) -> float:
        """Mean of ‖y - x‖ / ‖x‖ over the rows."""
        return self.moved / max(1, self.rows)
