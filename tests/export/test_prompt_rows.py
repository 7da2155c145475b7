from __future__ import annotations

import torch

from bertology_serve.export.prompt_rows import PromptLayout, gather
from bertology_serve.kinds.effects import PromptEffect

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])


def test_padding_goes_to_the_end_wherever_it_was():
    rows = gather(IDS, MASK, IDS + 10)
    assert rows.count.tolist() == [[4], [2], [2], [2]]
    assert rows.seen.long().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert [ids[:n].tolist() for ids, n in zip(rows.ids, rows.count, strict=True)] == [
        [5, 6, 7, 8],
        [5, 6],
        [7, 8],
        [6, 8],
    ]
    assert torch.equal(rows.types, rows.ids + 10)
    assert torch.equal(rows.ids.gather(1, rows.home), IDS)


def test_prompt_rows_stand_where_the_spec_says():
    words = torch.arange(3.0).view(1, 3, 1) + 10
    vectors = torch.tensor([[1.0], [2.0]])
    places = {"after_cls": [10, 1, 2, 11, 12], "before_cls": [1, 2, 10, 11, 12]}
    for placement, expected in places.items():
        weave = PromptLayout(PromptEffect(vectors, placement), offset=0)
        woven = weave.embed(words)
        assert woven.flatten().tolist() == expected
        assert torch.equal(weave.text(woven), words)


def test_positions_and_the_row_that_the_head_reads():
    vectors = torch.zeros(2, 4)
    found = {
        (placement, positions, reads): (weave.positions(3)[0].tolist(), weave.first)
        for placement, positions, reads in [
            ("after_cls", "kept", "cls"), ("after_cls", "shifted", "cls"), ("after_cls", "kept", "first_row"),
            ("before_cls", "kept", "cls"), ("before_cls", "shifted", "first_row"),
        ]
        for weave in [PromptLayout(PromptEffect(vectors, placement, positions, reads), offset=2)]
    }  # fmt: skip
    assert found == {
        ("after_cls", "kept", "cls"): ([2, 2, 2, 3, 4], 0),
        ("after_cls", "shifted", "cls"): ([2, 3, 4, 5, 6], 0),
        ("after_cls", "kept", "first_row"): ([2, 2, 2, 3, 4], 0),
        ("before_cls", "kept", "cls"): ([2, 2, 2, 3, 4], 2),
        ("before_cls", "shifted", "first_row"): ([2, 3, 4, 5, 6], 0),
    }
    assert PromptLayout(None, offset=0).positions(3).tolist() == [[0, 1, 2]]
