from __future__ import annotations

import pytest

from bertology_serve.data.records import Record
from bertology_serve.errors import DataError
from bertology_serve.tasks.base import Example, Item, make_items
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import Encoding, TaskSpec
from bertology_serve.training.batches import micro_batches
from tests import tiny


def item(*lengths: int) -> Item:
    return Item(Example("x"), tuple(Encoding((1,) * n, (0,) * n) for n in lengths), None)


def test_micro_batches_keep_the_budget_and_every_item():
    items = [item(n) for n in (30, 5, 7, 40, 6, 5, 30)]
    groups = micro_batches(items, 60, padded=False)
    assert [[one.tokens for one in group] for group in groups] == [[5, 5, 6, 7, 30], [30], [40]]
    assert sorted(id(one) for group in groups for one in group) == sorted(map(id, items))


def test_padding_counts_where_sequences_are_padded():
    groups = micro_batches([item(n) for n in (5, 5, 6, 20)], 24, padded=True)
    assert [[one.tokens for one in group] for group in groups] == [[5, 5, 6], [20]]


def test_sequences_of_one_item_stay_together():
    groups = micro_batches([item(9, 9, 9), item(4), item(9, 2)], 16, padded=False)
    assert [[one.tokens for one in group] for group in groups] == [[4], [27], [11]]


def test_a_wrong_record_is_named():
    task = task_for(TaskSpec("classification", ("a", "b"), 16))
    records = [Record({"text": "good", "label": "a"}, "f:1"), Record({"text": "bad", "label": "c"}, "f:2")]
    with pytest.raises(DataError, match="f:2: field 'label' has the unknown label 'c'"):
        make_items(task, records, tiny.tokenizer())
    with pytest.raises(DataError, match="no records"):
        make_items(task, [], tiny.tokenizer())
