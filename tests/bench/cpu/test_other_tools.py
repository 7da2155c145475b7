from __future__ import annotations

import numpy as np
import pytest

from bertology_serve.bench.cpu.other_tools import answer, by_owner, feeds, part, pooled, sixteens


def batch(lengths):
    """Ids that say row and column."""
    columns = np.arange(max(lengths))
    mask = (columns < np.array(lengths)[:, None]).astype(np.int64)
    ids = (100 * np.arange(len(lengths))[:, None] + columns) * mask
    return {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * mask,
        "texts": [f"t{row}" for row in range(len(lengths))], "owners": ["xyz"[row % 3] for row in range(len(lengths))],
    }  # fmt: skip


def test_rows_are_pooled_over_their_tokens():
    hidden = np.array([[[3.0, 0.0], [9.0, 8.0], [50.0, 50.0]]])
    mask = np.array([[1, 1, 0]])
    assert pooled(hidden, mask, "mean") == pytest.approx(np.array([[6.0, 4.0]]) / np.sqrt(52))
    assert pooled(hidden, mask, "cls").tolist() == [[3.0, 0.0]]
    assert pooled(hidden, mask, "") is hidden


def test_the_pooled_output_is_taken_where_there_is_one():
    assert answer(["last_hidden_state", "sentence_embedding"]) == "sentence_embedding"
    assert answer(["logits"]) == "logits"


def test_a_part_is_padded_to_its_longest():
    found = part(batch([2, 5, 3]), [2, 0])
    assert found["input_ids"].tolist() == [[200, 201, 202], [0, 1, 0]]
    assert (found["texts"], found["owners"]) == (["t2", "t0"], ["z", "x"])


@pytest.mark.parametrize("arrange", [sixteens, lambda bind: by_owner(dict.fromkeys("xyz", bind))])
def test_rows_run_in_parts_come_back_in_their_order(arrange):
    lengths = [int(one) for one in np.random.default_rng(0).integers(1, 40, 50)]
    whole, seen = batch(lengths), []

    def bind(one):
        seen.append(one)
        return lambda: one["input_ids"].sum(1, keepdims=True)

    rows = arrange(bind)(whole)()
    assert rows.tolist() == whole["input_ids"].sum(1, keepdims=True).tolist()
    assert sum(len(one["texts"]) for one in seen) == 50
    assert sum(one["input_ids"].size for one in seen) < whole["input_ids"].size


def test_sixteens_are_sorted():
    sizes = []

    def bind(one):
        sizes.append(sorted(one["attention_mask"].sum(1).tolist()))
        return lambda: one["input_ids"]

    sixteens(bind)(batch(list(range(1, 41))[::-1]))
    assert [(one[0], one[-1]) for one in sizes] == [(1, 16), (17, 32), (33, 40)]


def test_calibration_gives_batches_in_turn(tmp_path):
    arrays = {f"{number}.{name}": np.full((1, 2), number) for number in range(3)
              for name in ("input_ids", "attention_mask", "token_type_ids")}  # fmt: skip
    np.savez(tmp_path / "c.npz", **arrays)
    assert [one["input_ids"].tolist() for one in feeds(str(tmp_path / "c.npz"))] == [[[0, 0]], [[1, 1]], [[2, 2]]]
