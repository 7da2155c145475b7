from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.tasks.zero_shot import LONGEST_LABEL, MOST_LABELS, Drawn, ZeroShot, read_label_texts, readable

SPEC = TaskSpec("zero-shot", ("card_arrival", "top_up"), 16, "mean", "none", label_texts=("my card is late", "top up"))
TASK = ZeroShot(SPEC)


def asked(**fields: object):
    return TASK.example({"text": "a", **fields}, "request", labelled=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [("card_arrival", "card arrival"), ("PlayMusic", "Play Music"), ("a_b-c", "a b-c"), ("C++", "C++"), ("_", "_"),
     ("NASA", "NASA"), ("iPhone", "iPhone"), ("lost my card?", "lost my card?")],
)  # fmt: skip
def test_names_become_words(name: str, text: str):
    assert readable(name) == text


def test_a_call_brings_its_labels_or_gets_the_delta_s_own():
    own = asked()
    assert (own.labels, own.label_texts) == (SPEC.labels, SPEC.label_texts)
    brought = asked(labels=["lost_card", "top_up"], template="it says: {}")
    assert brought.label_texts == ("it says: lost card", "it says: top up"), "known names have their texts"
    assert TASK.beside(brought) == brought.label_texts
    assert not brought.several
    assert asked(labels=["x", "y"], multi_label=True).several
    assert asked(labels=["x"]).several, "softmax of one label says nothing"
    labelled = TASK.example({"text": "a", "label": "top_up", "labels": ["z"]}, "r", labelled=True)
    assert (labelled.label, labelled.labels) == ("top_up", SPEC.labels)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": []}, "'labels' has 0 items"),
        ({"labels": ["x"] * (MOST_LABELS + 1)}, f"expected 1 to {MOST_LABELS}"),
        ({"labels": ["x", " x "]}, "a label twice"),
        ({"labels": ["x" * (LONGEST_LABEL + 1)]}, f"of {LONGEST_LABEL + 1} characters; at most {LONGEST_LABEL}"),
        ({"labels": "x, y"}, "expected a list"),
        ({"labels": ["x", 3]}, r"'labels\[1\]' is 3"),
        ({"labels": ["x", ""]}, r"'labels\[1\]' is empty"),
        ({"multi_label": "yes"}, "'multi_label' is 'yes'"),
        ({"template": "about it"}, "{} where a label's name goes"),
        ({"template": "{}" + "x" * LONGEST_LABEL}, f"up to {LONGEST_LABEL} characters"),
    ],
)
def test_what_a_call_may_not_ask(fields: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        asked(**fields)


def test_without_labels_of_its_own_a_call_has_to_bring_some():
    with pytest.raises(DataError, match="'labels' is missing"):
        ZeroShot(TaskSpec("zero-shot", head="none")).example({"text": "a"}, "request", labelled=False)


@pytest.mark.parametrize(
    "fields",
    [{"head": "linear"}, {"template": "no place"}, {"label_texts": ("one",)}, {"scale": 0.0}, {"bias": float("nan")}],
)
def test_specs_that_make_no_sense(fields: dict[str, object]):
    with pytest.raises(SpecError):
        TaskSpec(**{"kind": "zero-shot", "labels": ("a", "b"), "head": "none", **fields})


def test_a_label_is_one_sequence_that_is_not_cut(minilm):
    assert len(TASK.encode_beside("top up", minilm)) == 4
    with pytest.raises(DataError, match="tokens too many: this delta reads 16"):
        TASK.encode_beside("top up " * 20, minilm)


def test_logits_are_scaled_cosines():
    rows, labels = torch.randn(3, 8), torch.randn(2, 8)
    expected = 20 * torch.nn.functional.cosine_similarity(rows[:, None].double(), labels[None].double(), dim=-1)
    assert torch.allclose(TASK.compared(rows, labels).double(), expected, atol=1e-5)


def test_answers_are_sorted_and_are_softmax_or_sigmoid():
    logits = torch.tensor([1.0, 9.0, 12.0])
    one = TASK.decode(asked(labels=["a", "b", "c"]), [], [logits])
    assert list(one["scores"]) == ["c", "b", "a"]
    assert (one["label"], one["score"]) == ("c", one["scores"]["c"])
    assert list(one["scores"].values()) == pytest.approx(sorted(logits.double().softmax(0).tolist(), reverse=True))
    several = TASK.decode(asked(labels=["a", "b", "c"], multi_label=True), [], [logits])
    assert several["labels"] == ["c"]
    assert several["scores"] == pytest.approx(
        {label: 1 / (1 + np.exp(10.0 - x)) for label, x in zip("abc", (1.0, 9.0, 12.0), strict=True)}
    )


def test_the_training_loss_takes_every_label_of_the_batch_once():
    spec = TaskSpec("zero-shot", ("a", "b", "c", "d"), head="none")
    torch.manual_seed(0)
    names, texts = torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    targets = [Drawn(0, (2,)), Drawn(1, (0,)), Drawn(0, (2,))]
    rows = [row for text, target in zip(texts, targets, strict=True)
            for row in (text, names[int(target)], *(names[i] for i in target.others))]  # fmt: skip
    found = ZeroShot(spec).loss(torch.stack(rows), [], targets)
    logits = 20 * F.normalize(texts) @ F.normalize(names[:3]).T  # d is nobody's
    assert float(found) == pytest.approx(
        float(F.cross_entropy(logits, torch.tensor([0, 1, 0]), reduction="sum")), rel=1e-5
    )


def test_other_labels_are_drawn_from_those_seen():
    task = ZeroShot(TaskSpec("zero-shot", tuple("abcdef"), head="none"))
    targets = [0, 1, 3] * 50
    drawn = task.drawn(targets, seed=1)
    assert [int(one) for one in drawn] == targets
    assert all(set(one.others) == {0, 1, 3} - {int(one)} for one in drawn)
    assert [one.others for one in drawn] == [one.others for one in task.drawn(targets, seed=1)]
    assert task.drawn([0, 1], 0)[0].others == (1,)
    assert task.drawn([2, 2], 0)[0].others == ()


def test_the_bias_is_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5, generator=generator, dtype=torch.float64) * 4
    gold = torch.randint(5, (50,), generator=generator)
    hot = F.one_hot(gold, 5).double()

    def cost(bias: float) -> float:
        return float(F.binary_cross_entropy_with_logits(logits + bias, hot))

    found = TASK.bias(logits, gold.tolist())
    assert cost(found) <= min(cost(found + 0.01), cost(found - 0.01))


def test_texts_of_labels_from_a_file(tmp_path: Path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps({"a_b": "the first", "other": "x"}))
    assert read_label_texts(str(file), ("a_b", "c_d")) == ("the first", "c d")
    for text, message in (("{", "expected a JSON file"), ("[]", "no object of texts"), ('{"x": "y"}', "names none")):
        file.write_text(text)
        with pytest.raises(SpecError, match=message):
            read_label_texts(str(file), ("a_b",))
    with pytest.raises(SpecError, match="expected a JSON file"):
        read_label_texts(str(tmp_path / "missing"), ("a_b",))


def test_among_the_labels_of_other_data():
    records = [({"text": "a", "label": label}, "r") for label in ("top_up", "new_one")]
    spec = TASK.among(records)
    assert (spec.labels, spec.label_texts) == (("new_one", "top_up"), ("new one", "top up"))
