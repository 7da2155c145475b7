"""Small data sets in the tiny tokenizer's words, one a task, each with something to learn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertology_serve.data.records import Record
from bertology_serve.training.batches import Source

PEOPLE, PLACES, THINGS = ("Ada", "dog", "cat"), ("Paris", "London"), ("film", "river", "house", "bank")


def classification() -> list[dict[str, Any]]:
    """Good or bad, said plainly."""
    words = [("good", "up"), ("great", "up"), ("bad", "down"), ("not good", "down")]
    return [{"text": f"the {thing} was {word}", "label": label} for word, label in words for thing in THINGS]


def multi_label() -> list[dict[str, Any]]:
    """Good or bad, and whether it is said by denying."""
    words = [("good", ["up"]), ("bad", ["down"]), ("not good", ["down", "denied"]), ("great", ["up"])]
    return [{"text": f"the {thing} was {word}", "label": labels} for word, labels in words for thing in THINGS]


def regression() -> list[dict[str, Any]]:
    """How many of two words are good."""
    pairs = itertools.product(("good", "great", "bad", "cold"), repeat=2)
    return [
        {"text": f"{a} film", "text_pair": f"{b} house", "score": 2.0 + sum(w in ("good", "great") for w in (a, b))}
        for a, b in pairs
    ]


def token_classification() -> list[dict[str, Any]]:
    """Who went where."""
    return [
        {"tokens": [who, "went", "to", where, "."], "tags": ["B-WHO", "O", "O", "B-PLACE", "O"]}
        for who in PEOPLE
        for where in PLACES
    ]


def question_answering() -> list[dict[str, Any]]:
    """Where someone went, out of a context of several windows."""
    rows = []
    for who, where in itertools.product(PEOPLE, PLACES):
        context = f"the river is cold . {who} went to {where} in the early bank . the film was good , the house red ."
        start = context.index(where)
        answers = {"text": [where], "answer_start": [start]}
        rows.append({"question": f"where is {who} ?", "context": context, "answers": answers})
    return rows


def multiple_choice() -> list[dict[str, Any]]:
    """The choice that is good."""
    rows = []
    for right, thing in itertools.product((0, 1), THINGS):
        choices = [f"the {thing} is {'good' if choice == right else 'bad'}" for choice in (0, 1)]
        rows.append({"premise": "the film was warm", "choices": choices, "label": right})
    return rows


def embedding() -> list[dict[str, Any]]:
    """Alike where the same thing is named."""
    pairs = itertools.product(THINGS, repeat=2)
    return [{"text": f"the {a}", "text_pair": f"a {b}", "score": float(a == b)} for a, b in pairs]


def zero_shot() -> list[dict[str, Any]]:
    """The label whose name is in the text."""
    labels = ("red", "blue", "very_cold", "early_warm")
    return [
        {"text": f"the {thing} was {label.replace('_', ' ')}", "label": label} for label in labels for thing in THINGS
    ]


SETS = {
    "classification": classification,
    "multi-label": multi_label,
    "regression": regression,
    "token-classification": token_classification,
    "question-answering": question_answering,
    "multiple-choice": multiple_choice,
    "embedding": embedding,
    "zero-shot": zero_shot,
    "sparse": embedding,
    "multi-vector": embedding,
}
LENGTHS = {"question-answering": 24}


def source(task: str, name: str = "train.jsonl") -> Source:
    """A task's set as training takes it."""
    return Source(name, [Record(fields, f"{name}:{row}") for row, fields in enumerate(SETS[task](), 1)])


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes rows as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
