from __future__ import annotations

import random

import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from bertology_serve.tasks.token_classification import span_scores, spans_of

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def sentences(tags, seed):
    draw = random.Random(seed)
    return [[draw.choice(tags) for _ in range(draw.randint(1, 12))] for _ in range(40)]


@pytest.mark.parametrize("tags", [TAGS, [*TAGS, "E-PER", "S-PER", "S-LOC"], ["O", "B-a-b", "I-a-b"]])
def test_spans_equal_seqeval(tags):
    for sentence in sentences(tags, 0):
        expected = [(label, start, end + 1) for label, start, end in get_entities(sentence)]
        assert spans_of(sentence) == expected, sentence


def test_scores_equal_seqeval():
    gold, found = sentences(TAGS, 1), sentences(TAGS, 1)
    draw = random.Random(2)
    found = [[draw.choice(TAGS) if draw.random() < 0.3 else tag for tag in tags] for tags in found]
    scores = span_scores(gold, found)
    assert 0.2 < scores["f1"] < 0.9
    assert scores == pytest.approx(
        {"precision": precision_score(gold, found), "recall": recall_score(gold, found), "f1": f1_score(gold, found)}
    )


def test_tags_without_prefix_make_runs():
    assert spans_of(["NOUN", "NOUN", "VERB", "O"]) == [("NOUN", 0, 2), ("VERB", 2, 3)]


@pytest.mark.parametrize("names", ["BMES", "BILU", "BIES"])
def test_other_schemes_give_the_same_spans(names):
    named = dict(zip("BIES", names, strict=True))
    for sentence in sentences([*TAGS, "E-PER", "S-PER", "E-LOC", "S-LOC"], 3):
        other = [tag if tag == "O" else named[tag[0]] + tag[1:] for tag in sentence]
        assert spans_of(other) == spans_of(sentence)


def test_a_class_index_of_0_is_outside():
    """A model that says 0 of every word has found nothing."""
    assert spans_of(["0", "0", "1", "1", "0"]) == [("1", 2, 4)]
    gold, silent = [["0", "0", "1", "0"], ["0"] * 5], [["0"] * 4, ["0"] * 5]
    assert span_scores(gold, silent) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert span_scores(gold, gold)["f1"] == 1.0


def test_nothing_found_scores_zero():
    assert span_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
