"""Texts from wherever they come, tokenised as the tasks do."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.analysis.subject_model import Subject, data_name, read_texts
from bertology_serve.errors import DataError, NotFound, SpecError
from tests import tiny
from tests.training import sets

TOKENIZER = tiny.tokenizer("bert")


def ids(*texts: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(*texts)["input_ids"])


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"text": "the cat"}, ("the cat",)),
        ({"text_a": "the cat", "text_b": "a dog"}, ("the cat", "a dog")),
        ({"question": "who went", "context": "Ada went"}, ("who went", "Ada went")),
        ({"premise": "the film", "question": "what", "choices": []}, ("the film", "what")),
        ({"tokens": ["the", "cat", "?"], "text": "not this"}, ("the cat ?",)),
    ],
)
def test_records_of_every_task(row: dict, texts: tuple[str, ...], tmp_path: Path) -> None:
    found = read_texts(sets.write(tmp_path / "rows.jsonl", [row]), TOKENIZER, 32)
    assert [encoding.ids for encoding in found] == [ids(*texts)]


def test_lines_lists_and_built_in_examples(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("the cat\n\n a dog \nthe film\n")
    assert [encoding.ids for encoding in read_texts(path, TOKENIZER, 32, 2)] == [ids("the cat"), ids("a dog")]
    assert [len(encoding) for encoding in read_texts(["the cat was in the house"], TOKENIZER, 5)] == [5]
    assert len(read_texts(None, TOKENIZER, 32)) > 10
    names = [data_name(corpus) for corpus in (None, path, ["a", "b"])]
    assert names == ["built-in examples", str(path), "2 texts"]


def test_records_in_memory() -> None:
    rows = [{"text": "the cat"}, {"tokens": ["a", "dog"]}]
    assert [encoding.ids for encoding in read_texts(rows, TOKENIZER, 32)] == [ids("the cat"), ids("a dog")]
    assert data_name(rows) == "list"


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        read_texts([], TOKENIZER, 32)
    with pytest.raises(NotFound, match="no file"):
        read_texts(tmp_path / "nothing.txt", TOKENIZER, 32)


def test_what_is_no_encoder() -> None:
    for wrong in (5, object()):
        with pytest.raises(SpecError, match="expected an Encoder, its name or its directory"):
            Subject.of(wrong)  # type: ignore[arg-type]
