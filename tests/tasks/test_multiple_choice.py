from __future__ import annotations

import pytest
import torch

from bertology_serve.errors import DataError
from bertology_serve.tasks.multiple_choice import MOST_CHOICES, MultipleChoice
from bertology_serve.tasks.spec import TaskSpec

TASK = MultipleChoice(TaskSpec("multiple-choice", max_length=32))
CHOICES = ["It rained.", "It froze."]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"premise": "The road was wet.", "question": "cause"}, "The road was wet. What was the cause of this?"),
        ({"premise": "It rained.", "question": "effect"}, "It rained. What happened as a result?"),
        ({"premise": "Ada woke.", "question": "Why?"}, "Ada woke. Why?"),
        ({"premise": "Ada woke."}, "Ada woke."),
        ({"question": "Why?"}, "Why?"),
    ],
)
def test_prompts(record, prompt):
    assert TASK.example({**record, "choices": CHOICES}, "x:1", False).prompt == prompt


def test_each_choice_is_a_sequence(minilm):
    example = TASK.example({"question": "Why?", "choices": [*CHOICES, "No reason."], "label": "2"}, "x:1", True)
    encodings = TASK.encode(example, minilm)
    assert [list(encoding.ids) for encoding in encodings] == [
        minilm("Why?", choice)["input_ids"] for choice in example.choices
    ]
    assert TASK.target(example, encodings) == (2, 3)


def test_examples_with_other_numbers_of_choices_share_a_batch():
    out = torch.tensor([[1.0], [2.0], [0.0], [3.0], [1.0]])
    loss = TASK.loss(out, [4] * 5, [(1, 2), (0, 3)])
    expected = -out[:2, 0].log_softmax(0)[1] - out[2:, 0].log_softmax(0)[0]
    torch.testing.assert_close(loss, expected)
    assert TASK.weight([(1, 2), (0, 3)]) == 2


def test_answer():
    example = TASK.example({"question": "Why?", "choices": CHOICES}, "x:1", False)
    answer = TASK.decode(example, [], [torch.tensor([0.0]), torch.tensor([1.0])])
    assert answer["choice"] == 1
    assert sum(answer["scores"]) == pytest.approx(1.0)
    assert answer["score"] == max(answer["scores"])
    gold = [TASK.example({"question": "Why?", "choices": CHOICES, "label": label}, "x:1", True) for label in (0, 1)]
    assert TASK.metrics([answer, answer], gold) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"choices": ["one"]}, r"field 'choices' has 1 items; expected 2 to 64"),
        ({"choices": ["x"] * (MOST_CHOICES + 1)}, r"field 'choices' has 65 items"),
        ({"choices": "ab"}, r"field 'choices' is 'ab' \(str\); expected a list"),
        ({"choices": ["a", ""]}, r"field 'choices\[1\]' is empty"),
        ({"choices": None}, r"field 'choices' is missing"),
        ({"label": 2}, r"field 'label' is 2 \(int\); expected an integer from 0 to 1"),
        ({"label": -1}, r"field 'label' is -1"),
        ({"label": True}, r"field 'label' is True"),
        ({"label": "x"}, r"field 'label' is 'x'"),
        ({"label": 0.5}, r"field 'label' is 0.5"),
        ({"label": "\uff11"}, r"field 'label' is .*; expected an integer from 0 to 1"),
        ({"question": None}, r"fields 'premise' and 'question' are missing"),
    ],
)
def test_bad_records(change, problem):
    with pytest.raises(DataError, match=rf"^x:3: {problem}"):
        TASK.example({"question": "Why?", "choices": CHOICES, "label": 0, **change}, "x:3", True)


def test_real_copa(real_data):
    examples = [TASK.example(fields, where, True) for fields, where in real_data("copa", "dev", 100)]
    assert {example.label for example in examples} == {0, 1}
    assert all("?" in example.prompt for example in examples)
