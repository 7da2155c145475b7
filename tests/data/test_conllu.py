"""CoNLL-U: what of a sentence is kept, and what is no CoNLL-U."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve import examples
from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError

TEXT = """# text = I'm it
1-2\tI'm\t_\t_\t_\t_\t_\t_\t_\t_
1\tI\t_\tPRON\t_\t_\t3\tnsubj:outer\t_\t_
2\tam\t_\tAUX\t_\t_\t3\tcop\t_\t_
2.1\tx\t_\t_\t_\t_\t_\t_\t_\t_
3\tit\t_\tPRON\t_\t_\t0\troot\t_\t_


# a comment alone

1\tGo\t_\tVERB\t_\t_\t0\troot\t_\t_
"""


def test_sentences(tmp_path: Path) -> None:
    file = tmp_path / "a.conllu"
    file.write_text(TEXT)
    first, second = read_records(file)
    assert first.fields == {
        "tokens": ["I", "am", "it"], "tags": ["PRON", "AUX", "PRON"], "heads": [3, 3, 0],
        "relations": ["nsubj", "cop", "root"],
    }  # fmt: skip
    assert first.where == f"{file}:3"
    assert second.fields["tokens"] == ["Go"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\tGo\t_", "3 columns; expected 10"),
        ("2\tGo\t_\tVERB\t_\t_\t0\troot\t_\t_", "expected word 1"),
        ("1\tGo\t_\tVERB\t_\t_\t2\troot\t_\t_", "expected word 1 with a head of 0 to 1"),
        ("1\tGo\t_\tVERB\t_\t_\t_\troot\t_\t_", "with head '_'"),
        ("1\tGo\t_\tVERB\t_\t_\t\uff10\troot\t_\t_", "with head '\uff10'"),
    ],
)
def test_what_is_no_conllu_is_said_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.conllu"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}:1")


def test_the_built_in_sentences_are_trees() -> None:
    records = read_records(examples.trees())
    assert len(records) == 60
    for record in records:
        heads = record.fields["heads"]
        assert heads.count(0) == 1
        for start in range(len(heads)):
            at, steps = start, 0
            while heads[at]:
                at, steps = heads[at] - 1, steps + 1
                assert steps <= len(heads), record.where
        assert (record.fields["relations"].index("root")) == heads.index(0)
