"""A few sequences and the model's own output for them, taken before anything is wrapped: what loading is proven on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.slots import Anatomy
from bertology_serve.encoder.anatomy import EXPECTED
from bertology_serve.encoder.bank import BARE, LiveBank
from bertology_serve.encoder.packing import pack
from bertology_serve.errors import Unsupported
from bertology_serve.tasks.spec import Encoding

_LENGTHS = (3, 7, 3, 150)  # equal lengths share a group; the longest passes ModernBERT's window
_TOLERANCE = 1e-4
_SEEN = 1e-6  # what another last token changes in the first row at least, where that sees it
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
        """Runs the untouched model; the token ids are drawn from a seed of their own.

        Raises Unsupported for a model in which the first row does not see the last.
        """
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().num_embeddings
        low = min(5, vocabulary - 1)  # padding ids stand first in most vocabularies
        encodings, rows = [], []
        with torch.inference_mode():
            for length in (min(length, anatomy.max_tokens) for length in _LENGTHS):
                ids = torch.randint(low, vocabulary, (1, length), generator=generator)
                rows.append(_rows(model, ids))
                encodings.append(Encoding(tuple(ids[0].tolist()), (0,) * length))
            ids = torch.tensor([encodings[0].ids])
            ids[0, -1] = low if ids[0, -1] != low else vocabulary - 1
            if _apart(_rows(model, ids)[0], rows[0][0]) <= _SEEN:
                raise Unsupported(
                    f"in {anatomy.family} the first token does not see the last, as in a decoder; {EXPECTED}"
                )
        return cls(tuple(encodings), tuple(rows))

    def gap(self, encoder: Any) -> str:
        """What is wrong where the encoder gives the sequences, in one batch, other rows than they got alone; or ""."""
        kind = "packed" if encoder.packs else "padded"
        batch = pack(self.encodings, [BARE] * len(self.encodings), encoder.anatomy, encoder.device, not encoder.packs)
        try:
            with torch.inference_mode():
                hidden = encoder.run(batch, LiveBank([]))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"{kind} rows end in {type(error).__name__} ({' '.join(str(error).split())[:120]})"
        apart = max(
            _apart(hidden[start : start + length], self.rows[original])
            for start, length, original in zip(batch.starts, batch.lengths, batch.order, strict=True)
        )
        return "" if apart <= _TOLERANCE else f"{kind} rows differ from the model's own by {apart:.1e}"


def _rows(model: Any, ids: Tensor) -> Tensor:
    """The model's last hidden states [length, H] for ids [1, length]."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]  # type: ignore[no-any-return]


def _apart(rows: Tensor, own: Tensor) -> float:
    """The largest difference, relative to the largest entry where that is above 1; infinity for NaN."""
    apart = float((rows - own).abs().max()) / max(1.0, float(own.abs().max()))
    return apart if apart == apart else math.inf
