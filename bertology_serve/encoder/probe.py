"""A few sequences and the model's own output for them, taken before anything is wrapped: what loading is proven on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.bank import BARE, LiveBank
from bertology_serve.encoder.packing import pack
from bertology_serve.tasks.spec import Encoding

_LENGTHS = (3, 7, 3, 150)  # equal lengths share a group; the longest passes ModernBERT's window
_TOLERANCE = 1e-4
_STEPS, _AROUND = 16, 2


def rounding(layers: int, scale: float) -> float:
    """By how much float32 outputs that reach ``scale`` may differ between two engines that compute the same.

    They add the same products in other orders: up to 16 of float32's steps (2⁻²³ of the largest output, or of 1) in
    each layer, where embeddings and head count as one each. NaN, which nothing is within, where ``scale`` is no number.
    """
    if not math.isfinite(scale):
        return math.nan
    return _STEPS * torch.finfo(torch.float32).eps * (layers + _AROUND) * max(1.0, scale)


@dataclass(frozen=True)
class Probe:
    """Random sequences, and for each the rows [length, H] that the untouched model gives it alone."""

    encodings: tuple[Encoding, ...]
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: Any, anatomy: Anatomy) -> Probe:
        """Runs the untouched model; the token ids are drawn from a seed of their own."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        low = min(5, vocabulary - 1)  # padding ids stand first in most vocabularies
        encodings, rows = [], []
        with torch.inference_mode():
            for length in (min(length, anatomy.max_tokens) for length in _LENGTHS):
                ids = torch.randint(low, vocabulary, (1, length), generator=generator)
                rows.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0])
                encodings.append(Encoding(tuple(ids[0].tolist()), (0,) * length))
        return cls(tuple(encodings), tuple(rows))

    def holds(self, encoder: Any) -> bool:
        """Whether the encoder gives all the sequences, in one batch, the rows that they got alone."""
        batch = pack(self.encodings, [BARE] * len(self.encodings), encoder.anatomy, encoder.device, not encoder.packs)
        try:
            with torch.inference_mode():
                hidden = encoder.run(batch, LiveBank([]))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        return all(
            _near(hidden[start : start + length], self.rows[original])
            for start, length, original in zip(batch.starts, batch.lengths, batch.order, strict=True)
        )


def _near(rows: Tensor, own: Tensor) -> bool:
    difference, scale = float((rows - own).abs().max()), float(own.abs().max())
    return math.isfinite(scale) and difference <= _TOLERANCE * max(1.0, scale)
