"""What fits into an encoder's positions, to the token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def by_hand(tokens: int, entry: BankEntry, offset: int) -> tuple[list[int], list[int], list[int], int]:
    """(rows of text, rows of prompts, positions, the row a [CLS] head reads) of one sequence alone."""
    shift = VIRTUAL if entry.prefix is not None and entry.prefix.positions == "shifted" else 0
    kinds = ["text"] * tokens
    if entry.prompt is not None:
        at = 0 if entry.prompt.placement == "before_cls" else 1
        kinds[at:at] = ["prompt"] * VIRTUAL
    counted = entry.prompt is not None and entry.prompt.positions == "shifted"
    positions, seen = [], 0
    for row, kind in enumerate(kinds):
        positions.append(offset + shift + (row if counted else seen if kind == "text" else 0))
        seen += kind == "text"
    text = [row for row, kind in enumerate(kinds) if kind == "text"]
    prompts = [row for row, kind in enumerate(kinds) if kind == "prompt"]
    first = 0 if entry.prompt is not None and entry.prompt.head_reads == "first_row" else text[0]
    return text, prompts, positions, first


@pytest.mark.parametrize("padded", [False, True])
@given(st.lists(st.tuples(st.sampled_from([*ENTRIES, "first row"]), st.integers(1, 20)), min_size=1, max_size=12))
def test_a_batch_is_each_sequence_by_hand(encoder: Encoder, padded: bool, asked: list[tuple[str, int]]):
    kinds = {name: replace(entry, key=name) for name, (entry, _) in ENTRIES.items()}
    kinds["first row"] = BankEntry(
        "first", {PROMPT: ROWS}, prompt=PromptEffect(VECTORS, "before_cls", "kept", "first_row")
    )
    ids = iter(range(1000))
    work = [Encoding(tuple(next(ids) for _ in range(n)), tuple(j % 2 for j in range(n))) for _, n in asked]
    entries = [kinds[name] for name, _ in asked]
    batch = pack(work, entries, encoder.anatomy, encoder.device, padded)
    assert sorted(batch.order) == list(range(len(asked)))
    rank = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in asked))}
    assert list(batch.order) == sorted(
        range(len(asked)), key=lambda i: (rank[asked[i][0]], asked[i][1] + entries[i].prompt_length)
    )
    texts, prompts, vectors, firsts = [], [], [], []
    for place, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        own, entry = work[batch.order[place]], entries[batch.order[place]]
        text, prompt_rows, positions, first = by_hand(len(own), entry, encoder.anatomy.position_offset)
        assert length == len(positions)
        assert batch.positions[start : start + length].tolist() == positions
        assert [batch.ids[start + row].item() for row in text] == list(own.ids)
        assert [batch.types[start + row].item() for row in text] == list(own.types)
        texts += [start + row for row in text]
        prompts += [start + row for row in prompt_rows]
        vectors += [ROWS.first + i for i in range(len(prompt_rows))]
        firsts.append(start + first)
    assert batch.text_rows.tolist() == texts
    assert batch.prompt_rows.tolist() == prompts
    assert batch.prompt_vectors.tolist() == vectors
    assert batch.first_rows.tolist() == firsts
    assert batch.rows == (batch.stride * len(asked) if padded else sum(batch.lengths))
