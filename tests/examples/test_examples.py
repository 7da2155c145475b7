from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from bertology_serve.errors import NotFound
from bertology_serve.examples import NAMES, SPLITS, path

ROWS = {
    "sentiment": (120, 40),
    "intent": (160, 48),
    "entities": (120, 40),
    "similarity": (100, 40),
    "qa": (60, 20),
    "choice": (60, 20),
}
FIELDS = {
    "sentiment": {"text", "label"},
    "intent": {"text", "label"},
    "entities": {"tokens", "tags"},
    "similarity": {"text", "text_pair", "score"},
    "qa": {"question", "context", "answers"},
    "choice": {"premise", "question", "choices", "label"},
}
# What of a record may not stand in both splits: a paragraph or a first sentence would give its pair away.
KEYS = {"entities": "tokens", "qa": "context", "choice": "premise"}
INTENTS = "block_card check_balance lights play_music set_alarm shopping_list transfer_money weather".split()
FILES = [(name, split) for name in NAMES for split in SPLITS]


def records(name: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path(name, split).read_text(encoding="ascii").splitlines()]


def test_names_are_the_files():
    assert set(NAMES) == set(ROWS)
    assert {file.name for file in path("qa", "dev").parent.glob("*.jsonl")} == {f"{n}.{s}.jsonl" for n, s in FILES}


@pytest.mark.parametrize(("name", "split"), FILES)
def test_counts_fields_and_no_record_twice(name, split):
    rows = records(name, split)
    assert len(rows) == ROWS[name][SPLITS.index(split)]
    assert {frozenset(row) for row in rows} == {frozenset(FIELDS[name])}
    assert len({json.dumps(row, sort_keys=True).lower() for row in rows}) == len(rows)
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    assert all(text and text == text.strip() for text in texts)


@pytest.mark.parametrize("name", NAMES)
def test_dev_repeats_nothing_of_train(name):
    key = KEYS.get(name, "text")
    train, dev = ({str(row[key]).lower() for row in records(name, split)} for split in SPLITS)
    assert train & dev == set()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "labels"), [("sentiment", ["negative", "positive"]), ("intent", INTENTS)])
def test_labels_are_balanced(name, labels, split):
    counts = Counter(row["label"] for row in records(name, split))
    assert sorted(counts) == labels
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_tags_are_valid_bio(split):
    for row in records("entities", split):
        assert len(row["tokens"]) == len(row["tags"])
        assert all(token and token.split() == [token] for token in row["tokens"])
        for before, tag in zip(["O", *row["tags"]], row["tags"], strict=False):
            assert tag in {"O", *(f"{part}-{kind}" for part in "BI" for kind in ("PER", "LOC", "ORG"))}
            if tag.startswith("I-"):
                assert before[2:] == tag[2:], row


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_of_entity_and_sentences_without_any(split):
    rows = records("entities", split)
    found = Counter(tag[2:] for row in rows for tag in row["tags"] if tag.startswith("B-"))
    assert min(found[kind] for kind in ("PER", "LOC", "ORG")) >= len(rows) // 2
    assert any(set(row["tags"]) == {"O"} for row in rows)


@pytest.mark.parametrize("split", SPLITS)
def test_scores_use_the_whole_scale(split):
    scores = [row["score"] for row in records("similarity", split)]
    assert min(scores) == 0.0
    assert max(scores) == 5.0
    assert all(any(low <= score < low + 1 for score in scores) for low in range(5))
    assert all(row["text"] != row["text_pair"] for row in records("similarity", split))


@pytest.mark.parametrize("split", SPLITS)
def test_answers_stand_where_they_are_said_to(split):
    for row in records("qa", split):
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        assert len(texts) == len(starts) == 1
        assert row["context"][starts[0] : starts[0] + len(texts[0])] == texts[0]
        assert row["question"].endswith("?")


@pytest.mark.parametrize("split", SPLITS)
def test_choices_are_two_and_labels_balanced(split):
    rows = records("choice", split)
    assert all(len(set(row["choices"])) == 2 for row in rows)
    assert {row["question"] for row in rows} == {"cause", "effect"}
    assert Counter(row["label"] for row in rows) == {0: len(rows) // 2, 1: len(rows) // 2}


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(NotFound, match="'sentimnt'; did you mean 'sentiment'"):
        path("sentimnt", "train")
    with pytest.raises(NotFound, match=r"no split 'test'; .*known: dev, train"):
        path("qa", "test")
