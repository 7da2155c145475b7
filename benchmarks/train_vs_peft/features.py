"""Records -> what transformers' Trainer takes, tokenised by HuggingFace's calls alone.

For the answers the same sequences come as ``Encoding``, so that one decoding serves both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.train_vs_peft.works import STRIDE, Work
from bertology_serve.data.records import Record
from bertology_serve.tasks.spec import QUESTION_ANSWERING, REGRESSION, TOKEN_CLASSIFICATION, Encoding

IGNORED = -100


@dataclass(frozen=True)
class Sequences:
    """The sequences of one record: one, or the windows of a question."""

    inputs: list[dict[str, list[int]]]
    encodings: list[Encoding]


def sequences(tokenizer: Any, work: Work, record: Record) -> Sequences:
    """A record tokenised."""
    fields, _ = record
    if work.known.task == QUESTION_ANSWERING:
        made = tokenizer(
            fields["question"], fields["context"], truncation="only_second", max_length=work.max_length, stride=STRIDE,
            return_overflowing_tokens=True,
        )  # fmt: skip
    elif work.known.task == TOKEN_CLASSIFICATION:
        made = tokenizer([fields["tokens"]], is_split_into_words=True, truncation=True, max_length=work.max_length)
    else:
        texts = [fields.get("text", fields.get("text_a")), fields.get("text_pair", fields.get("text_b"))]
        made = tokenizer(*[[text] for text in texts if text], truncation=True, max_length=work.max_length)
    names = tokenizer.model_input_names
    inputs = [{name: made[name][row] for name in names} for row in range(len(made["input_ids"]))]
    return Sequences(inputs, [_encoding(one) for one in made.encodings])


def features(tokenizer: Any, work: Work, record: Record) -> list[dict[str, Any]]:
    """A training record's sequences with what the loss compares them with, under Trainer's names."""
    found = sequences(tokenizer, work, record)
    rows = zip(found.inputs, found.encodings, strict=True)
    return [{**inputs, **_target(work, record[0], encoding)} for inputs, encoding in rows]


def _target(work: Work, fields: Mapping[str, Any], encoding: Encoding) -> dict[str, Any]:
    if work.known.task == QUESTION_ANSWERING:
        answers = fields["answers"]
        start = answers["answer_start"][0]
        first, last = _answer_rows(encoding, start, start + len(answers["text"][0]))
        return {"start_positions": first, "end_positions": last}
    if work.known.task == TOKEN_CLASSIFICATION:
        return {"labels": _tag_rows(encoding, [work.labels.index(tag) for tag in fields["tags"]])}
    label = fields["label"]
    return {"labels": float(label) if work.known.task == REGRESSION else work.labels.index(str(label))}


def _answer_rows(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """First and last token of an answer, as run_qa.py finds them; [CLS] where the window lacks part of it."""
    rows = [row for row, part in enumerate(encoding.parts) if part == 1]
    if encoding.offsets[rows[0]][0] > start or encoding.offsets[rows[-1]][1] < end:
        return 0, 0
    first = max(row for row in rows if encoding.offsets[row][0] <= start)
    last = min(row for row in rows if encoding.offsets[row][1] >= end)
    return first, last


def _tag_rows(encoding: Encoding, tags: Sequence[int]) -> list[int]:
    """The tag on each word's first token, ignored elsewhere."""
    befores = (-1, *encoding.words)
    rows = zip(encoding.words, befores, strict=False)
    return [tags[word] if word >= 0 and word != before else IGNORED for word, before in rows]


def _encoding(one: Any) -> Encoding:
    """A ``tokenizers.Encoding`` in our terms."""
    return Encoding(
        ids=tuple(one.ids), types=tuple(one.type_ids), offsets=tuple(one.offsets),
        parts=tuple(-1 if part is None else part for part in one.sequence_ids),
        words=tuple(-1 if word is None else word for word in one.word_ids),
    )  # fmt: skip
