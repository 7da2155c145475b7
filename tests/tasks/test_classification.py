from __future__ import annotations

import numpy as np
import pytest
import torch

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.base import all_pairs
from bertology_serve.tasks.classification import Classification
from bertology_serve.tasks.spec import TaskSpec

TASK = Classification(TaskSpec("classification", ("bad", "good", "mixed")))


def test_answer_is_a_softmax():
    answer = TASK.decode(TASK.example({"text": "x"}, "x:1", False), [], [torch.tensor([0.0, 2.0, 1.0])])
    expected = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64).softmax(0).tolist()
    assert answer["label"] == "good"
    assert answer["score"] == pytest.approx(expected[1])
    assert answer["scores"] == pytest.approx(dict(zip(("bad", "good", "mixed"), expected, strict=True)))


def test_target_and_loss():
    targets = [TASK.target(TASK.example({"text": "x", "label": label}, "x:1", True), []) for label in ("mixed", "bad")]
    assert targets == [2, 0]
    out = torch.zeros(2, 3)
    assert TASK.loss(out, [1, 1], targets).item() == pytest.approx(2 * torch.log(torch.tensor(3.0)).item())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 2, 1, "2"], ("1", "2", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        ([" a ", "b"], ("a", "b")),
    ],
)
def test_labels_are_found_in_a_stable_order(labels, expected):
    assert Classification.labels_in([({"label": label}, "x:1") for label in labels]) == expected


def test_integer_labels_match_names_that_are_digits():
    task = Classification(TaskSpec("classification", ("0", "1")))
    assert task.target(task.example({"text": "x", "label": 1}, "x:1", True), []) == 1


@pytest.mark.parametrize(
    ("known", "expected", "values"),
    [
        (("False", "True"), "True", [True, "True", "TRUE", "true", np.bool_(True), {"true": 3, False: 1}]),
        (("false", "true"), "false", [False, "False", "FALSE", np.bool_(False)]),
        (("0", "1"), "1", [1, "1", 1.0, "1.0", "1.00", np.int64(1), np.float64(1)]),
        (("0.0", "1.0"), "1.0", [1, "1", 1.0, "1.0", np.int64(1)]),
        (("-1", "1"), "-1", [-1, "-1.0"]),
        (("True", "true"), "true", ["true", True]),
        (("1", "1.0"), "1.0", ["1.0"]),
        (("v1.0", "v1"), "v1", ["v1"]),
    ],
)
def test_a_label_is_the_same_however_a_file_spells_it(known, expected, values):
    task = Classification(TaskSpec("classification", known))
    for value in values:
        example = task.example({"text": "x", "label": value}, "x:1", True)
        assert example.label == expected, value
        assert {*example.shares} <= {*known}


def test_names_that_look_alike_stay_apart():
    names = ["True", "true", "1.0", "1", "v1.0"]
    assert {*Classification.labels_in([({"label": name}, "x:1") for name in names])} == {*names}
    task = Classification(TaskSpec("classification", ("True", "true")))
    with pytest.raises(DataError, match="has the unknown label 'TRUE'"):
        task.example({"text": "x", "label": "TRUE"}, "x:1", True)
    with pytest.raises(DataError, match="-100, which means that there is no label"):
        task.example({"text": "x", "label": "-100.0"}, "x:1", True)


@pytest.mark.parametrize("label", [1.5, float("nan"), [], {}, "", "  "])
def test_labels_of_no_sense_are_refused(label):
    with pytest.raises(DataError, match=r"^x:9: field 'label' is .*expected a label"):
        TASK.example({"text": "x", "label": label}, "x:9", True)


def test_unknown_label_names_the_nearest():
    with pytest.raises(DataError, match=r"^x:9: field 'label' has the unknown label 'god'; did you mean 'good'\?"):
        TASK.example({"text": "x", "label": "god"}, "x:9", True)


def test_metrics():
    examples = [TASK.example({"text": "x", "label": label}, "x:1", True) for label in ("bad", "good", "good", "mixed")]
    answers = [{"label": label} for label in ("bad", "good", "bad", "mixed")]
    metrics = TASK.metrics(answers, examples)
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert set(metrics) == {"accuracy", "macro_f1", "mcc"}


def test_real_labels(real_data):
    records = real_data("banking77", "test", 3080)
    labels = Classification.labels_in(records)
    assert len(labels) == 77
    task = Classification(TaskSpec("classification", labels))
    assert all(task.example(fields, where, True).label in labels for fields, where in records)


def test_a_delta_of_pairs_refuses_a_single_text():
    pairs = Classification(TaskSpec("classification", ("bad", "good"), pairs=True))
    assert pairs.example({"text_a": "x", "text_b": "y"}, "x:1", False).text_pair == "y"
    with pytest.raises(DataError, match="x:1: field 'text_pair' is missing; this delta was trained on pairs of texts"):
        pairs.example({"text": "x"}, "x:1", False)
    with pytest.raises(SpecError, match="pairs does not fit embedding"):
        TaskSpec("embedding", head="none", pairs=True)


@pytest.mark.parametrize(
    ("kind", "records", "pairs"),
    [
        ("classification", [{"text": "a", "text_pair": "b"}, {"text_a": "a", "text_b": "b"}], True),
        ("regression", [{"text": "a", "text_pair": "b"}, {"text": "a"}], False),
        ("classification", [{"text": "a", "text_pair": None}], False),
        ("embedding", [{"text": "a", "text_pair": "b"}], False),
    ],
)
def test_data_say_whether_they_are_pairs(kind, records, pairs):
    assert all_pairs(kind, [(record, "x:1") for record in records]) is pairs


def test_soft_labels_are_learnt_as_they_are():
    example = TASK.example({"text": "x", "label": {"good": 3, "mixed": 1}}, "x:1", True)
    assert example.label == "good"
    assert TASK.target(example, []) == (0.0, 0.75, 0.25)
    out = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    expected = -(torch.tensor([0.0, 0.75, 0.25]) * out[0].log_softmax(0)).sum()
    torch.testing.assert_close(TASK.loss(out, [], [TASK.target(example, [])]), expected)
    assert Classification.labels_in([({"label": '{"a": 0.5, "b": 0.5}'}, "x:1")]) == ("a", "b")
    with pytest.raises(DataError, match=r"^x:9: field 'label' is .*expected a label, or the share of each"):
        TASK.example({"text": "x", "label": {"good": -1}}, "x:9", True)


def test_class_weights_and_smoothing_are_torch_s_and_scikit_learn_s():
    utils = pytest.importorskip("sklearn.utils.class_weight")
    targets = [0, 1, 1, 1, 2, 2]
    out = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    weights = utils.compute_class_weight("balanced", classes=torch.arange(3).numpy(), y=targets)
    expected = torch.nn.functional.cross_entropy(
        out, torch.tensor(targets), torch.tensor(weights).float(), reduction="sum"
    )
    torch.testing.assert_close(TASK.loss(out, [], TASK.shaped(targets, True, 0.0)), expected)
    expected = torch.nn.functional.cross_entropy(out, torch.tensor(targets), label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(TASK.loss(out, [], TASK.shaped(targets, False, 0.2)), expected)


def test_below_abstain_no_label_is_named():
    careful = Classification(TaskSpec("classification", ("bad", "good", "mixed"), abstain=0.6))
    examples = [careful.example({"text": "x", "label": label}, "x:1", True) for label in ("good", "bad", "mixed")]
    logits = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.1, 0.0], [0.0, 3.0, 0.0]])
    answers = [careful.decode(*pair) for pair in zip(examples, [[]] * 3, [[row] for row in logits], strict=True)]
    assert [answer["label"] for answer in answers] == ["good", None, "good"]
    assert answers[1]["scores"]["good"] == pytest.approx(answers[1]["score"])
    found = careful.metrics(answers, examples)
    assert (found["coverage"], found["accuracy_covered"]) == (2 / 3, 0.5)
    assert found["accuracy"] == 1 / 3
