from __future__ import annotations

import pytest

from bertology_serve.data.examples import infer_labels, load_examples
from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import TaskSpec


def test_labels_then_examples(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("sentence\tgold\nfine\t1\npoor\t0\n", encoding="utf-8")
    columns = {"text": "sentence", "label": "gold"}
    labels = infer_labels("classification", read_records(path, columns))
    assert labels == ("0", "1")
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
    with pytest.raises(DataError, match=r"x\.csv:3: field 'text' is missing; expected a text"):
        load_examples(path, task)


def test_one_label_is_not_enough():
    with pytest.raises(DataError, match="holds only the label x; expected at least two"):
        infer_labels("classification", [({"label": "x"}, "f:1")])
    assert infer_labels("regression", [({"label": 1.0}, "f:1")]) == ()
    with pytest.raises(SpecError, match="did you mean 'embedding'"):
        infer_labels("embeding", [])
