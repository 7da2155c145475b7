from __future__ import annotations

import numpy as np
import pytest
import torch

from bertology_serve.errors import DataError
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.tasks.token_classification import TokenClassification

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TASK = TokenClassification(TaskSpec("token-classification", LABELS, max_length=16))
TOKENS = ["Ada", "Lovelace", "visited", "Zürich-Oerlikon", "."]
TAGS = ["B-PER", "I-PER", "O", "B-LOC", "O"]


def logits_for(encoding, tags, others="B-LOC"):
    """Rows [len, C] that say each word's tag on its first subword and something else on all other rows."""
    rows, seen = [], set()
    for word in encoding.words:
        tag = tags[word] if word >= 0 and word not in seen else others
        seen.add(word)
        rows.append([8.0 if label == tag else 0.0 for label in LABELS])
    return torch.tensor(rows)


def test_first_subwords_carry_the_tags(minilm):
    example = TASK.example({"tokens": TOKENS, "tags": TAGS}, "x:1", True)
    (encoding,) = TASK.encode(example, minilm)
    target = TASK.target(example, [encoding])
    pieces = minilm.convert_ids_to_tokens(list(encoding.ids))
    labelled = {piece: LABELS[index] for piece, index in zip(pieces, target, strict=True) if index >= 0}
    assert labelled == {"ada": "B-PER", "love": "I-PER", "visited": "O", "zurich": "B-LOC", ".": "O"}
    assert TASK.weight([target, target]) == 10
    assert TASK.loss(logits_for(encoding, TAGS), [len(encoding)], [target]).item() < 0.01
    wrong = logits_for(encoding, ["O"] * 5)
    assert TASK.loss(wrong, [len(encoding)], [target]).item() == pytest.approx(3 * 8.0, abs=0.01)


def test_entities_have_characters_of_the_joined_tokens(minilm):
    example = TASK.example({"tokens": TOKENS}, "x:1", False)
    (encoding,) = TASK.encode(example, minilm)
    answer = TASK.decode(example, [encoding], [logits_for(encoding, TAGS)])
    text = " ".join(TOKENS)
    assert answer["tags"] == TAGS
    assert [(entity["label"], entity["text"]) for entity in answer["entities"]] == [
        ("PER", "Ada Lovelace"),
        ("LOC", "Zürich-Oerlikon"),
    ]
    assert all(text[entity["start"] : entity["end"]] == entity["text"] for entity in answer["entities"])
    probability = torch.tensor([8.0, 0, 0, 0, 0], dtype=torch.float64).softmax(0)[0].item()
    assert answer["entities"][0]["score"] == pytest.approx(probability)


def test_a_text_keeps_its_own_characters(minilm):
    text = "\tAda Lovelace's visit (Zürich-Oerlikon)."
    example = TASK.example({"text": text}, "x:1", False)
    (encoding,) = TASK.encode(example, minilm)
    words = [text[start:end] for start, end in example.spans]
    tags = [{"Ada": "B-PER", "Lovelace": "I-PER", "Zürich-Oerlikon": "B-LOC"}.get(word, "O") for word in words]
    answer = TASK.decode(example, [encoding], [logits_for(encoding, tags)])
    assert set(answer) == {"entities"}
    assert [(entity["text"], entity["start"]) for entity in answer["entities"]] == [
        ("Ada Lovelace", 1),
        ("Zürich-Oerlikon", 23),
    ]


def test_a_word_without_a_gold_tag_teaches_and_counts_nothing(minilm):
    """-100, as torch and HuggingFace write it; seqeval is asked without such words in HuggingFace's own recipe."""
    tags = ["B-PER", -100, "O", "B-LOC", "-100"]
    example = TASK.example({"tokens": TOKENS, "tags": tags}, "x:1", True)
    (encoding,) = TASK.encode(example, minilm)
    target = TASK.target(example, [encoding])
    assert [LABELS[index] for index in target if index >= 0] == ["B-PER", "O", "B-LOC"]
    assert TASK.weight([target]) == 3
    answer = {"tags": ["B-PER", "B-LOC", "O", "O", "I-LOC"]}
    assert TASK.metrics([answer], [example]) == pytest.approx(
        {"f1": 2 / 3, "precision": 1.0, "recall": 0.5, "accuracy": 2 / 3}
    )
    none = TASK.example({"tokens": ["a"], "tags": [-100]}, "x:1", True)
    assert TASK.metrics([{"tags": ["B-PER"]}], [none]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 0.0}


def test_words_that_are_cut_off_are_o(minilm):
    short = TokenClassification(TaskSpec("token-classification", LABELS, max_length=4))
    example = short.example({"tokens": TOKENS, "tags": TAGS}, "x:1", True)
    (encoding,) = short.encode(example, minilm)
    answer = short.decode(example, [encoding], [logits_for(encoding, TAGS)])
    assert answer["tags"] == ["B-PER", "I-PER", "O", "O", "O"]
    metrics = short.metrics([answer], [example])
    assert metrics == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "accuracy": 0.8})


def test_a_token_without_subwords_is_o(minilm):
    example = TASK.example({"tokens": ["Ada", "\u200b"]}, "x:1", False)
    (encoding,) = TASK.encode(example, minilm)
    assert 1 not in encoding.words
    assert TASK.decode(example, [encoding], [logits_for(encoding, ["B-PER", "B-LOC"])])["tags"] == ["B-PER", "O"]


def test_a_sequence_without_labelled_rows_has_a_loss_of_zero():
    assert TASK.loss(torch.randn(3, 5), [3], [(-100, -100, -100)]).item() == 0.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tags": TAGS[:4]}, r"field 'tags' has 4 items; expected 5, one a token"),
        ({"tags": [*TAGS[:4], "B-PERS"]}, r"field 'tags\[4\]' has the unknown label 'B-PERS'; did you mean 'B-PER'"),
        ({"tags": "O O O O O"}, r"field 'tags' is 'O O O O O' \(str\); expected a list"),
        ({"tags": [*TAGS[:4], None]}, r"field 'tags\[4\]' is missing"),
        ({"tags": [*TAGS[:4], "\ud83d"]}, r"field 'tags\[4\]' holds '\\ud83d', half of a surrogate pair"),
        ({"tokens": []}, r"field 'tokens' has 0 items"),
        ({"tokens": ["a", " "]}, r"field 'tokens\[1\]' is only white space"),
        ({"tokens": "a b"}, r"field 'tokens' is 'a b' \(str\); expected a list"),
        ({"tokens": None}, r"field 'tokens' is missing"),
    ],
)
def test_bad_records(change, problem):
    with pytest.raises(DataError, match=rf"^x:8: {problem}"):
        TASK.example({"tokens": TOKENS, "tags": TAGS, **change}, "x:8", True)


def test_tags_are_the_same_however_a_file_spells_them():
    task = TokenClassification(TaskSpec("token-classification", ("0", "1")))
    for tags in ([1, -100], ["1.0", "-100.0"], [np.int64(1), -100.0]):
        assert task.example({"tokens": ["a", "b"], "tags": tags}, "x:1", True).tags == ("1", None)


def test_labels_start_with_o():
    records = [({"tags": ["B-LOC", "O"]}, "x:1"), ({"tags": ["A-first"]}, "x:2")]
    assert TokenClassification.labels_in(records) == ("O", "A-first", "B-LOC")
    assert TokenClassification.labels_in([({"tags": [10, 9]}, "x:1")]) == ("9", "10")


def test_real_tweets_with_perfect_rows_score_one(real_data, minilm):
    records = real_data("wnut17", "dev", 200)
    spec = TaskSpec("token-classification", TokenClassification.labels_in(records), max_length=512)
    task = TokenClassification(spec)
    examples = [task.example(fields, where, True) for fields, where in records]
    answers = []
    for example in examples:
        encodings = task.encode(example, minilm)
        rows = torch.tensor(task.target(example, encodings)).clamp(min=0)
        answers.append(task.decode(example, encodings, [torch.nn.functional.one_hot(rows, len(spec.labels)).float()]))
    assert task.metrics(answers, examples)["f1"] == 1.0
