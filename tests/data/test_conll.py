from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def sentences_of(folder: Path, text: str) -> list[tuple[list[str], list[str]]]:
    path = folder / "x.conll"
    path.write_bytes(text.encode())
    return [(record.fields["tokens"], record.fields["tags"]) for record in read_records(path)]


def test_a_hash_is_a_word_where_it_has_a_tag(tmp_path: Path):
    text = "# id 7 domain=en\n# O\n1 O\nAda B-PER\n\n#\n# text = # 1\nRome B-LOC\n# O\n# B-ODD\n\n# B-ODD\nis O\n"
    assert sentences_of(tmp_path, text) == [
        (["#", "1", "Ada"], ["O", "O", "B-PER"]),
        (["Rome", "#", "#"], ["B-LOC", "O", "B-ODD"]),
        (["#", "is"], ["B-ODD", "O"]),
    ]
    four = "# NN B-NP O\n1 CD I-NP O\n\n# sent_id = 2\n# doc = O\nAda NNP B-NP B-PER\n"
    assert sentences_of(tmp_path, four) == [(["#", "1"], ["O", "O"]), (["Ada"], ["B-PER"])]
    assert sentences_of(tmp_path, "# sent_id = 1\n# NOUN\ndog NOUN\n") == [(["#", "dog"], ["NOUN", "NOUN"])]


def test_only_tabs_and_spaces_part_columns(tmp_path: Path):
    words = ["10\u00a0000", "Rome\u2009City", "a\u2028b", "c\x85d", "e\x1cf", "\u3000g"]
    assert sentences_of(tmp_path, "".join(f"{word} O\r\n" for word in words)) == [(words, ["O"] * 6)]
    assert sentences_of(tmp_path, "New York\tB-LOC\n \t \nis\tO\t\n") == [(["New York"], ["B-LOC"]), (["is"], ["O"])]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("is O\nNew York B-LOC\n", r"x.conll:2: 3 columns; line 1, of the same sentence, has 2 \(words with spaces"),
        ("is O\n# text = so\n", r"x.conll:2: 4 columns"),
        ("is O\n#\n", r"x.conll:2: the word '#' has no tag"),
        ("is O\rit O\n", r"x.conll:1: a carriage return inside the line; save the file with \\n or"),
        ("\u00a0\n", r"x.conll:1: the word .* has no tag"),
    ],
)
def test_lines_of_another_shape_are_named(tmp_path: Path, text: str, problem: str):
    with pytest.raises(DataError, match=problem):
        sentences_of(tmp_path, text)


LETTERS = st.characters(codec="utf-8", exclude_characters="\0 \t\r\n")
WORDS = st.one_of(st.sampled_from(["#", "=", "##", "# a"]), st.text(LETTERS, min_size=1, max_size=6))
ROWS = st.lists(st.tuples(WORDS, st.sampled_from(["O", "B-X", "I-X"])), min_size=1, max_size=5)


@given(sentences=st.lists(ROWS, min_size=1, max_size=4), tabs=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_what_was_written_is_read(sentences, tabs, end):
    """Any words but white space of our own; with tabs, spaces inside words too."""
    if not tabs:
        sentences = [[(word.replace(" ", "\u00a0"), tag) for word, tag in rows] for rows in sentences]
    head = f"-DOCSTART- O{end}{end}"
    body = "".join(f"{word}{chr(9 if tabs else 32)}{tag}{end}" for rows in sentences for word, tag in [*rows, ("", "")])
    with TemporaryDirectory() as folder:
        found = sentences_of(Path(folder), head + body)
    assert found == [([word for word, _ in rows], [tag for _, tag in rows]) for rows in sentences]
