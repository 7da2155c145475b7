from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bertology_serve.data.records import infer_labels, read_records
from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.fields import read_labels
from bertology_serve.tasks.metrics import calibration_error
from bertology_serve.tasks.multi_label import MultiLabel
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.evaluation import Evaluation

TASK = MultiLabel(TaskSpec("multi-label", ("a", "b", "c")))


def labelled(*values):
    return [({"text": "x", "label": value}, f"x:{row}") for row, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([["b"], ["a", "b"], []], ("a", "b")),
        ([[0, 0, 1], [1, 0, 1]], ("0", "1", "2")),
        ([[True, False], [False, False]], ("0", "1")),
        ([[1.0, 0.0], [0.0, 1.0]], ("0", "1")),
        ([[3], [3, 12], [0]], ("0", "3", "12")),
        (["a|b", "b", None], ("a", "b")),
        (["one, two;three", "three"], ("one, two", "three")),
        (["a, b", "b"], ("a", "b")),
        (["good"], ("good",)),
        ([{"a": 1, "b": 0}, {"a": 0, "b": 1}], ("a", "b")),
        (['["a", "b"]', "[]"], ("a", "b")),
        ([["a"], [-100]], ("a",)),
        ([np.array([0, 1, 1])], ("0", "1", "2")),
    ],
)
def test_labels_are_found(values, expected):
    assert MultiLabel.labels_in(labelled(*values)) == expected


@pytest.mark.parametrize(
    ("value", "has"),
    [
        (["a", "c"], "ac"),
        ([], ""),
        (None, ""),
        ([0, 1, 1], "bc"),
        ([False, True, False], "b"),
        ("a|b", "ab"),
        ("c", "c"),
        ("a; b", "ab"),
        ("b,c", "bc"),
        ({"a": 1, "b": 0}, "a"),
        ('["a"]', "a"),
    ],
)
def test_what_a_record_has(value, has):
    example = TASK.example({"text": "x", "label": value}, "x:1", True)
    assert "".join(label for label in "abc" if example.labels.get(label)) == has
    assert TASK.example({"text": "x", "labels": value}, "x:1", True) == example


@pytest.mark.parametrize("row", ["True,False", "TRUE,FALSE", "1.0,0.0", "1,0"])
def test_cells_of_columns_say_what_applies(tmp_path, row):
    path = tmp_path / "x.csv"
    path.write_text(f"text,toxic,insult\nx,{row}\n")
    records = read_records(path, {"label": "toxic|insult"})
    assert read_labels(*records[0], {"toxic": 0, "insult": 1}) == {"toxic": 1, "insult": 0}


def test_labels_are_the_same_however_a_file_spells_them():
    known = {"0.0": 0, "1.0": 1, "2.0": 2}
    for value in ([0, 2], ["0", "2.0"], "0|2", "0.0, 2", np.array([0, 2]), [np.int64(0), np.int64(2)]):
        assert read_labels({"label": value}, "x:1", known) == {"0.0": 1, "2.0": 1}, value
    assert read_labels({"label": "-100.0"}, "x:1", known) == dict.fromkeys(known, -100)


PAIR = {"0": 0, "1": 1}


@pytest.mark.parametrize("value", [[0, 1], ["0", "1"], "0|1", "[1, 0]"])
def test_class_indices_are_names_also_where_there_are_two(value):
    """As scikit-learn's MultiLabelBinarizer has ``[[0, 1]]``."""
    assert read_labels({"label": value}, "x:1", PAIR) == {"0": 1, "1": 1}
    rows = [fields for fields, _ in labelled([0], value, [1])]
    found = [read_labels(*record, PAIR) for record in read_records(rows)]
    assert found == [{"0": 1}, {"0": 1, "1": 1}, {"1": 1}]


@pytest.mark.parametrize("values", [[[0, 1], [1, 1]], [[0, 1], [1, 0]], [[0, 1], None], [[0, 1], -100]])
def test_lists_of_zero_and_one_are_so_in_the_whole_data_set(values):
    records = read_records([fields for fields, _ in labelled(*values)])
    assert MultiLabel.labels_in(records) == ("0", "1")
    assert read_labels(*records[0], PAIR) == {"0": 0, "1": 1}
    assert read_labels(*read_records(records[:1])[0], PAIR) == {"0": 0, "1": 1}


def test_a_part_of_a_data_set_of_indices_stays_indices():
    records = read_records([fields for fields, _ in labelled([0], [0, 1], [1])])
    part = read_records(records[1:2])
    assert read_labels(*part[0], PAIR) == {"0": 1, "1": 1}


def test_a_label_that_is_not_known_teaches_nothing_and_counts_nowhere():
    known = TASK.example({"text": "x", "label": [1, 0, 0]}, "x:1", True)
    unsure = TASK.example({"text": "x", "label": [1, -100, 0]}, "x:1", True)
    assert TASK.target(known, []) == (1, 0, 0, 0, 1, 1)
    assert TASK.target(unsure, []) == (1, 0, 0, 0, 0, 1)
    none = TASK.example({"text": "x", "label": -100}, "x:1", True)
    assert not any(TASK.target(none, []))
    out = torch.tensor([[3.0, 5.0, -2.0]], requires_grad=True)
    TASK.loss(out, [], [TASK.target(unsure, [])]).backward()
    assert out.grad[0, 1] == 0
    answers = [TASK.decode(unsure, [], [out[0].detach()])]
    assert TASK.metrics(answers, [unsure])["exact"] == 1
    assert TASK.metrics(answers, [known])["exact"] == 0


def test_what_is_not_known_is_in_no_metric():
    """As scikit-learn has it over the known cells: of each label for macro F1, of each text for sample F1."""
    reference = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(1)
    gold, found = (generator.random((30, 3)) < 0.4 for _ in range(2))
    known = generator.random((30, 3)) < 0.7
    known[:, 2], known[:3] = False, False
    cells = np.where(known, gold, -100).tolist()
    examples = [TASK.example({"text": "x", "label": row}, "x:1", True) for row in cells]
    scores = [dict(zip("abc", row, strict=True)) for row in generator.random((30, 3)).tolist()]
    answers = [
        {"labels": [label for label, one in zip("abc", row, strict=True) if one], "scores": own}
        for row, own in zip(found, scores, strict=True)
    ]
    f1 = partial(reference.f1_score, zero_division=0)
    rows = [row for row in range(30) if known[row].any()]
    expected = {
        "micro_f1": f1(gold[known], found[known]),
        "macro_f1": np.mean([f1(gold[known[:, at], at], found[known[:, at], at]) for at in range(2)]),
        "samples_f1": np.mean([f1(gold[row, known[row]], found[row, known[row]]) for row in rows]),
        "exact": np.mean([(gold == found)[row, known[row]].all() for row in rows]),
    }
    assert TASK.metrics(answers, examples) == pytest.approx(expected)
    sure = TASK.certainty(answers, examples)
    said = np.array([list(own.values()) for own in scores])
    assert sure == pytest.approx(np.stack([said[known], gold[known]], 1))
    records = [({"text": "x", "label": row}, "x:1") for row in cells]
    assert Evaluation({}, answers, 0, TASK, examples, records).calibration.value == pytest.approx(
        calibration_error(sure)
    )


def test_of_texts_without_a_known_label_nothing_is_measured():
    examples = [TASK.example({"text": "x", "label": -100}, "x:1", True)] * 2
    answers = [{"labels": ["a"], "scores": {"a": 0.9, "b": 0.1, "c": 0.1}}] * 2
    assert not any(TASK.metrics(answers, examples).values())
    assert Evaluation({}, answers, 0, TASK, examples, []).calibration is None


def test_labels_above_their_thresholds_are_named():
    task = MultiLabel(TaskSpec("multi-label", ("a", "b", "c"), thresholds=(0.9, 0.5, 0.1)))
    answer = task.decode(task.example({"text": "x"}, "x:1", False), [], [torch.tensor([2.0, 1.0, -2.0])])
    assert answer["labels"] == ["b", "c"]
    assert answer["scores"] == pytest.approx({"a": 0.880797, "b": 0.731059, "c": 0.119203}, abs=1e-6)


def test_loss_is_torch_s_and_soft_labels_count():
    generator = torch.Generator().manual_seed(0)
    out, gold = torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator)
    rows = [dict(zip("abc", row, strict=True)) for row in gold.tolist()]
    targets = [TASK.target(TASK.example({"text": "x", "label": row}, "x:1", True), []) for row in rows]
    expected = 5 * F.binary_cross_entropy_with_logits(out, gold)
    torch.testing.assert_close(TASK.loss(out, [], targets), expected)


def test_metrics_are_scikit_learn_s():
    reference = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    gold, found = (generator.random((40, 3)) < 0.4 for _ in range(2))
    examples = [TASK.example({"text": "x", "label": row.tolist()}, "x:1", True) for row in gold]
    answers = [{"labels": [label for label, one in zip("abc", row, strict=True) if one]} for row in found]
    expected = {
        f"{name}_f1": reference.f1_score(gold, found, average=name, zero_division=0)
        for name in ("micro", "macro", "samples")
    }
    measured = TASK.metrics(answers, examples)
    assert measured == pytest.approx({**expected, "exact": reference.accuracy_score(gold, found)})
    assert TASK.main(TASK.parts(answers, examples)) == pytest.approx(measured["micro_f1"])


def test_balance_and_smoothing():
    targets = [(1.0, 0.0, 0.0, 0.0, 1.0, 1.0), *[(0.0, 0.0, 1.0, 1.0, 1.0, 0.0)] * 3]
    rows = torch.tensor(TASK.shaped(targets, True, 0.0)).view(4, 2, 3)
    assert rows[:, 0, 0].sum() == rows[:, 1, 0].sum() == 2
    assert TASK.shaped(targets, False, 0.2)[0] == pytest.approx((0.9, 0.1, 0.1, 0.1, 0.9, 0.9))


@pytest.mark.parametrize("value", [["a", "d"], "a|d", {"d": 1}])
def test_an_unknown_label_is_named(value):
    with pytest.raises(DataError, match=r"^x:1: field 'label' has the unknown label 'd'"):
        TASK.example({"text": "x", "label": value}, "x:1", True)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"thresholds": (0.5,)}, "1 thresholds do not fit multi-label of 3 labels"),
        ({"thresholds": (0.5, 2.0, 0.1)}, "expected numbers from 0 to 1"),
        ({"abstain": 0.5}, "abstain does not fit multi-label"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(fields, problem):
    with pytest.raises(SpecError, match=problem):
        TaskSpec("multi-label", ("a", "b", "c"), **fields)


@pytest.mark.parametrize("value", [[1, 0, 1], ["thing", "thing"]])
def test_a_label_named_twice_is_a_list_of_another_length(value):
    with pytest.raises(DataError, match=r"x:2: field 'label' has '(1|thing)' twice; expected names, each once, or 0"):
        infer_labels("multi-label", [({"label": [1, 0]}, "x:1"), ({"label": value}, "x:2")])


def test_a_share_that_is_none_is_shown_as_it_stands():
    with pytest.raises(DataError, match=r"x:3: field 'label' has 'yes' for 'toxic'; expected 0, 1, or a share between"):
        read_labels({"label": {"toxic": "yes", "insult": 0}}, "x:3", {"toxic": 0, "insult": 1})
