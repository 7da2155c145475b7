"""The encoder: packed rows equal transformers' own output, gradients flow, weights are known by their hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.packing import pack
from bertology_serve.tasks.spec import Encoding
from tests import tiny


def encodings(lengths: tuple[int, ...], seed: int = 0) -> list[Encoding]:
    """Random sequences of those lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 30, (n,), generator=generator).tolist() for n in lengths]
    return [Encoding(tuple(row), (0,) * len(row)) for row in ids]


def run(encoder: Encoder, sequences: list[Encoding], padded: bool = False) -> list[torch.Tensor]:
    """The rows of each sequence, in the order given."""
    bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
    batch = pack(sequences, [BARE] * len(sequences), encoder.anatomy, encoder.device, padded)
    with torch.inference_mode():
        hidden = encoder.run(batch, bank)
    rows = [hidden[start : start + n] for start, n in zip(batch.starts, batch.lengths, strict=True)]
    return [rows[batch.order.index(i)] for i in range(len(sequences))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_rows_equal_transformers_own(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    own = AutoModel.from_pretrained(tmp_path).eval()
    assert encoder.packs
    sequences = encodings((5, 1, 9, 5, 40, 2))
    for sequence, rows in zip(sequences, run(encoder, sequences), strict=True):
        with torch.inference_mode():
            expected = own(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
        torch.testing.assert_close(rows, expected, atol=2e-6, rtol=1e-5)
