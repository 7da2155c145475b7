from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError

TEXT = "-DOCSTART- -X- -X- O\n\nAda NNP B-NP B-PER\nleft VBD B-VP O\n\n# sent_id = 2\nParis\tB-LOC\n"


def test_sentences_are_between_empty_lines(tmp_path: Path):
    path = tmp_path / "train.conll"
    path.write_text(TEXT, encoding="utf-8")
    assert [tuple(record) for record in read_records(path)] == [
        ({"tokens": ["Ada", "left"], "tags": ["B-PER", "O"]}, f"{path}:3"),
        ({"tokens": ["Paris"], "tags": ["B-LOC"]}, f"{path}:7"),
    ]


def test_a_word_without_a_tag_is_named(tmp_path: Path):
    path = tmp_path / "train.conll"
    path.write_text("Ada B-PER\nleft\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.conll:2: the word 'left' has no tag"):
        read_records(path)
