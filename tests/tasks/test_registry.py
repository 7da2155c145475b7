from __future__ import annotations

import pytest
import torch

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.registry import TASKS, task_for, task_named
from bertology_serve.tasks.spec import POOLED_KINDS, TASK_KINDS, VECTOR_KINDS, TaskSpec

LABELS = ("O", "B-x", "I-x")
LABELLED = ("classification", "multi-label", "token-classification", "zero-shot")
SPECS = {
    kind: TaskSpec(
        kind,
        LABELS if kind in LABELLED else (),
        16,
        head="none" if kind in POOLED_KINDS else "hf",
        width=4 if kind in ("sparse", "multi-vector") else 0,
    )
    for kind in TASK_KINDS
}
RECORDS = {
    "classification": {"text": "good dog", "label": "O"},
    "multi-label": {"text": "good dog", "label": ["O", "I-x"]},
    "regression": {"text": "a", "text_pair": "b", "score": 2.5},
    "token-classification": {"tokens": ["a", "b"], "tags": ["O", "B-x"]},
    "question-answering": {"question": "who?", "context": "It was Ada .", "answers": ["Ada"]},
    "multiple-choice": {"question": "why?", "choices": ["a", "b", "c"], "label": 2},
    **{kind: {"text": "a", "text_pair": "b", "score": 1} for kind in VECTOR_KINDS},
    "zero-shot": {"text": "good dog", "label": "O"},
}


def outputs_for(task, encodings, generator):
    """Random head outputs, one a sequence."""
    width = task.spec.outputs or len(task.spec.labels) or 6
    return [
        torch.randn((len(encoding), width) if task.spec.per_token else (width,), generator=generator)
        for encoding in encodings
    ]


def packed(task, outputs):
    return torch.cat(outputs) if task.spec.per_token else torch.stack(outputs)


def test_every_task_of_the_specs_is_there():
    assert tuple(TASKS) == TASK_KINDS
    with pytest.raises(SpecError, match="did you mean 'regression'"):
        task_named("regresion")
    with pytest.raises(SpecError, match="the spec is for 'regression'; expected 'classification'"):
        TASKS["classification"](SPECS["regression"])


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_from_record_to_metrics(kind, minilm):
    task = task_for(SPECS[kind])
    generator = torch.Generator().manual_seed(0)
    examples = [task.example(RECORDS[kind], f"x:{row}", True) for row in range(3)]
    answers = []
    for example in examples:
        encodings = task.encode(example, minilm)
        assert all(0 < len(encoding) <= 16 for encoding in encodings)
        answers.append(task.decode(example, encodings, outputs_for(task, encodings, generator)))
    found = task.metrics(answers, examples)
    assert next(iter(found)) == task.main_metric, "tables and boards show the first"
    assert all(-1.0 <= value <= 1.0 for name, value in found.items() if name != "mse")


@pytest.mark.parametrize("kind", [kind for kind in TASK_KINDS if kind not in VECTOR_KINDS])
def test_loss_is_a_sum_over_examples_and_flows_back(kind, minilm):
    task = task_for(SPECS[kind])
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(3):
        example = task.example(RECORDS[kind], "x:1", True)
        encodings = task.encode(example, minilm)
        parts.append(
            (outputs_for(task, encodings, generator), list(map(len, encodings)), task.target(example, encodings))
        )
    alone = [task.loss(packed(task, out), lengths, [target]) for out, lengths, target in parts]
    out = packed(task, [row for rows, _, _ in parts for row in rows]).requires_grad_()
    targets = [target for _, _, target in parts]
    together = task.loss(out, [length for _, lengths, _ in parts for length in lengths], targets)
    torch.testing.assert_close(together, torch.stack(alone).sum())
    together.backward()
    assert out.grad.isfinite().all()
    assert out.grad.abs().sum() > 0
    assert task.weight(targets) == 3 * task.weight(targets[:1]) > 0


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_gold_fields_are_ignored_unless_asked_for(kind, minilm):
    task = task_for(SPECS[kind])
    gold = {"label", "score", "tags", "answers"}
    bare = {name: value for name, value in RECORDS[kind].items() if name not in gold}
    wrong = {**bare, "label": object(), "score": "x", "answers": 3, "tags": 5}
    assert task.example(bare, "x:1", False) == task.example(wrong, "x:1", False)
    if kind not in VECTOR_KINDS:  # pairs without a score are learnt too
        with pytest.raises(DataError, match=r"^x:1: field '(label|score|tags|answers)' is missing; expected "):
            task.example(bare, "x:1", True)


BAD_TEXTS = [
    ("", "is empty"),
    (" \n\t", "only white space"),
    (3, r"3 \(int\)"),
    ([], r"\[\] \(list\)"),
    ("\ud800", r"'\\ud800', half of a surrogate pair \(was a text cut inside a character\?\)"),
]


@pytest.mark.parametrize(("value", "problem"), BAD_TEXTS)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("classification", "text"),
        ("classification", "text_pair"),
        ("classification", "text_b"),
        ("regression", "text_a"),
        ("embedding", "text"),
        ("token-classification", "text"),
        ("question-answering", "question"),
        ("question-answering", "context"),
        ("multiple-choice", "premise"),
        ("multiple-choice", "question"),
    ],
)
def test_texts_that_are_none_are_refused_by_name(kind, field, value, problem):
    record = {name: text for name, text in RECORDS[kind].items() if name in ("question", "context", "choices", "text")}
    if field == "text_a":
        del record["text"]
    with pytest.raises(DataError, match=rf"^in\.jsonl:7: field '{field}' .*{problem}") as caught:
        task_for(SPECS[kind]).example({**record, field: value}, "in.jsonl:7", False)
    assert "\n" not in str(caught.value)


def test_missing_text_names_what_was_found_and_aliases_do_not_double():
    task = task_for(SPECS["classification"])
    with pytest.raises(DataError, match=r"field 'text' is missing; expected a text \(fields found: sentence\)"):
        task.example({"sentence": "x"}, "x:1", False)
    with pytest.raises(DataError, match="'text' and 'text_a' mean the same"):
        task.example({"text": "x", "text_a": "y"}, "x:1", False)
    assert task.example({"text_a": "x", "text_b": "y", "text": None}, "x:1", False).text_pair == "y"
