"""Rows inside the graph, padded and packed, against what they must be."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from bertology_serve.export.emitter import row_nodes
from bertology_serve.export.emitter.nodes import Nodes, Output
from bertology_serve.export.emitter.row_nodes import Packed, Padded, PromptLayout, gather
from bertology_serve.kinds.effects import PromptEffect

IDS = np.array([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
MASK = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
TEXT = [[5, 6], [7, 8], [6, 8]]


def run(kind, prompt, ask):
    nodes = Nodes(20)
    ids, mask = nodes.input("ids"), nodes.input("mask")
    rows = kind(gather(ids, mask, ids + 10), PromptLayout.of(prompt, offset=2))
    model = nodes.model([ids, mask], Output("y", ask(rows).real(), ("batch",)))
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    return session.run(None, {"ids": IDS, "mask": MASK})[0]


def test_packed_rows_are_the_tokens_and_nothing_else():
    assert run(Packed, None, lambda rows: rows.ids).tolist() == [5, 6, 7, 8, 6, 8]
    assert run(Packed, None, lambda rows: rows.types).tolist() == [15, 16, 17, 18, 16, 18]
    assert run(Packed, None, lambda rows: rows.positions).tolist() == [2, 3] * 3
    assert run(Packed, None, lambda rows: rows.seen).shape == (3, 2)
    assert run(Padded, None, lambda rows: rows.seen).tolist() == [[1, 1, 0, 0]] * 3
    assert run(Padded, None, lambda rows: rows.positions).tolist() == [2, 3, 4, 5] * 3


def test_sequences_attend_with_those_of_like_length_and_come_back(monkeypatch):
    lengths = [1, 9, 16, 5, 4, 16, 2, 8, 3]

    def asked(ask):
        nodes = Nodes(20)
        ids, mask = nodes.input("ids"), nodes.input("mask")
        rows = Packed(gather(ids, mask, None), PromptLayout.of(None, offset=0))
        model = nodes.model([ids, mask], *(Output(f"y{i}", y.real(), ("n",)) for i, y in enumerate(ask(rows))))
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
        seen = np.arange(16)[None] < np.array(lengths)[:, None]
        return session.run(None, {"ids": np.arange(9 * 16).reshape(9, 16), "mask": seen.astype(np.int64)})

    def back(rows):
        hidden = rows.ids.real().unsqueeze(1) * 4.0 + Nodes.constant(rows.nodes, np.arange(4, dtype=np.float32))
        spread = rows.spread(hidden, 2, 2)
        grids = rows.grids(spread, 2, 2, rows.groups)
        return [hidden - rows.rejoined(rows.gathered(grids, 2, 2), 2, 2), *grids, *(one.which for one in rows.groups)]

    monkeypatch.setattr(row_nodes, "SPARED", 0)
    difference, *found = asked(back)
    assert not difference.any()
    assert [grid.shape[:3] for grid in found[:4]] == [(2, 3, 16), (2, 2, 8), (2, 2, 4), (2, 2, 2)]
    assert [which.tolist() for which in found[4:]] == [[1, 2, 5], [3, 7], [4, 8], [0, 6]]
    assert [found[2][0, :, 0, 0].tolist(), found[3][1, :, :, 1].tolist()] == [
        [4 * 16 * 4, 8 * 16 * 4],
        [[3, 3], [6 * 64 + 3, 6 * 64 + 7]],  # padding is a copy of its sequence's last row
    ]
    monkeypatch.setattr(row_nodes, "SPARED", 2**40)
    difference, *found = asked(back)
    assert not difference.any()
    assert [grid.shape[:3] for grid in found[:4]] == [(2, 9, 16), (2, 0, 0), (2, 0, 0), (2, 0, 0)]


@pytest.mark.parametrize("kind", [Padded, Packed])
@pytest.mark.parametrize("placement", ["after_cls", "before_cls"])
@pytest.mark.parametrize("positions", ["kept", "shifted"])
def test_prompt_rows_stand_where_the_spec_says(kind, placement, positions):
    prompt = PromptEffect(torch.zeros(2, 4), placement, positions)
    width = 2 if kind is Packed else 4
    lead = 1 if placement == "after_cls" else 0
    grid = run(kind, prompt, lambda rows: rows.virtual.where(rows.which, rows.ids + 100)).reshape(3, -1)
    for found, (first, second) in zip(grid.tolist(), TEXT, strict=True):
        text = [first + 100, second + 100]
        assert found[: 2 + 2] == [*text[:lead], 0, 1, *text[lead:]]
    stand = run(kind, prompt, lambda rows: rows.positions).reshape(3, -1)[0].tolist()
    kept = {"after_cls": [2, 2, 2, 3], "before_cls": [2, 2, 2, 3]}[placement]
    assert stand[:4] == (kept if positions == "kept" else [2, 3, 4, 5])
    assert len(stand) == width + 2
    spoken = run(kind, prompt, lambda rows: rows.spoken)
    assert spoken.sum() == 6
    assert spoken[:, lead : lead + 2].sum() == 0


@pytest.mark.parametrize("kind", [Padded, Packed])
@pytest.mark.parametrize(
    "prompt", [None, PromptEffect(torch.zeros(3, 4)), PromptEffect(torch.zeros(3, 4), "before_cls")]
)
def test_rows_go_into_the_grid_and_back_to_the_caller(kind, prompt):
    def doubled(rows):
        """[T, 4], the id four times."""
        return (rows.ids.unsqueeze(1) + Nodes.constant(rows.nodes, np.zeros(4, dtype=np.int64))).real()

    back = run(kind, prompt, lambda rows: rows.flat(rows.grid(doubled(rows), 2, 2), 2, 2) - doubled(rows))
    assert back.size
    assert not back.any()
    callers = run(kind, prompt, lambda rows: rows.callers(doubled(rows)))
    assert np.array_equal(callers[..., 0], IDS * MASK)
    first = run(kind, prompt, lambda rows: rows.first(doubled(rows)))[:, 0]
    if prompt is None or prompt.placement == "after_cls":
        assert first.tolist() == [5, 7, 6]
