"""What fits into an encoder's positions, to the token."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.bank import BARE, PREFIX, PROMPT, BankEntry
from bertology_serve.encoder.batch import pack
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import LimitError
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.kinds.effects import PrefixEffect, PromptEffect
from bertology_serve.tasks.spec import Encoding
from tests import tiny

VIRTUAL = 5
VECTORS = torch.zeros(VIRTUAL, 32)
ROWS = RowSegment(0, 0, 1, 1 + VIRTUAL)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """RoBERTa's positions begin at 2."""
    return tiny.encoder(request.param, tmp_path_factory.mktemp("packing"))


def prompt(placement: str, positions: str) -> BankEntry:
    return BankEntry("prompt", {PROMPT: ROWS}, prompt=PromptEffect(VECTORS, placement, positions))


def prefix(positions: str) -> BankEntry:
    return BankEntry("prefix", {PREFIX: ROWS}, prefix=PrefixEffect(VECTORS.view(1, VIRTUAL, 32), VECTORS, positions))


ENTRIES = {
    "bare": (BARE, 0),
    "prompt after [CLS]": (prompt("after_cls", "kept"), 0),
    "prompt before [CLS]": (prompt("before_cls", "kept"), 0),
    "shifted prompt": (prompt("before_cls", "shifted"), VIRTUAL),
    "shifted prompt after [CLS]": (prompt("after_cls", "shifted"), VIRTUAL),
    "prefix": (prefix("kept"), 0),
    "shifted prefix": (prefix("shifted"), VIRTUAL),
}


@pytest.mark.parametrize(("entry", "taken"), ENTRIES.values(), ids=ENTRIES.keys())
def test_the_last_position_is_used_and_none_beyond(encoder: Encoder, entry: BankEntry, taken: int):
    fits = encoder.anatomy.max_tokens - taken

    def batch(tokens: int) -> int:
        sequence = Encoding((2, *[7] * (tokens - 2), 3), (0,) * tokens)
        return int(pack([sequence], [entry], encoder.anatomy, encoder.device).positions.max())

    assert batch(fits) == encoder.anatomy.max_tokens - 1 + encoder.anatomy.position_offset
    with pytest.raises(LimitError, match=rf"a sequence of {fits + 1} tokens .* lower max_length"):
        batch(fits + 1)
