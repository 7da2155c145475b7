from __future__ import annotations

import itertools

import pytest

from bertology_serve.data.records import infer_labels, load_examples, read_records
from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec


def test_labels_then_examples(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("sentence\tgold\nfine\t1\npoor\t0\n", encoding="utf-8")
    columns = {"text": "sentence", "label": "gold"}
    labels = infer_labels("classification", read_records(path, columns))
    assert labels == ("0", "1")
    with pytest.raises(
        DataError, match=r"x\.tsv:2: field 'label' is missing; expected a label \(fields found: gold, sentence"
    ):
        infer_labels("classification", read_records(path))
    task = task_for(TaskSpec("classification", labels))
    assert [(example.text, example.label) for example in load_examples(path, task, columns)] == [
        ("fine", "1"),
        ("poor", "0"),
    ]
    assert [example.label for example in load_examples(path, task, columns, labelled=False)] == [None, None]


def test_an_empty_cell_is_a_missing_field(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,x\n,y\n", encoding="utf-8")
    task = task_for(TaskSpec("classification", ("x", "y")))
    with pytest.raises(
        DataError, match=r"x\.csv:3: field 'text' is missing \(it is null, or an empty cell\); expected a text"
    ):
        load_examples(path, task)


def test_one_label_is_not_enough():
    with pytest.raises(DataError, match="holds only the label x; expected at least two"):
        infer_labels("classification", [({"label": "x"}, "f:1")])
    assert infer_labels("regression", [({"label": 1.0}, "f:1")]) == ()
    with pytest.raises(SpecError, match="did you mean 'embedding'"):
        infer_labels("embeding", [])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "01", "001", "10", "9"], ("001", "01", "1", "9", "10")),
        (["b", "1", "a"], ("1", "a", "b")),
        ([True, 0.0, 2], ("0", "2", "true")),
        (["-1", "1_0", 10], ("-1", "10", "1_0")),
    ],
)
def test_the_order_of_labels_is_that_of_no_set(labels, expected):
    """Whatever the order of rows, and whatever order a set of texts has under one hash seed."""
    for order in itertools.permutations(labels):
        assert infer_labels("classification", [({"label": label}, "f:1") for label in order]) == expected


def test_no_label_is_no_class():
    tagged = [({"tags": [1, -100]}, "f:1"), ({"tags": ["-100", 0, -100.0]}, "f:2")]
    assert infer_labels("token-classification", tagged) == ("0", "1")
    for label in (-100, "-100"):
        with pytest.raises(DataError, match="f:2: field 'label' is -100, which means that there is no label"):
            infer_labels("classification", [({"label": 0}, "f:1"), ({"label": label}, "f:2"), ({"label": 1}, "f:3")])
