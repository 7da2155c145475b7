"""What is wrong in a file is one line that names file, row and column; the exit code is 2, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from tests import tiny
from tests.training import sets

GOOD = b"text,label\nthe film was good,up\nthe film was bad,down\n"
TAGS = '{"tokens": ["Ada", "left"], "tags": ["B-WHO", "O"]}\n'
ASKED = '{"question": "who ?", "context": "it was Ada .", "answers": "Ada"}\n'


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("bert", tmp_path_factory.mktemp("bert"))


CASES = {
    "missing column": (
        "classification",
        "x.csv",
        b"sentence,label\na,up\nb,down\n",
        "x.csv:2: field 'text' is missing",
    ),
    "missing label column": ("classification", "x.csv", b"text\na\nb\n", "x.csv:2: field 'label' is missing"),
    "missing column of a pair": (
        "embedding",
        "x.csv",
        b"text,score\na,1\n",
        "x.csv:2: field 'text_pair' (or 'positive')",
    ),
    "empty cell": (
        "classification",
        "x.csv",
        b"text,label\na,up\n,down\n",
        "x.csv:3: field 'text' is missing (it is null, or",
    ),
    "white space": (
        "classification",
        "x.jsonl",
        b'{"text": " ", "label": 1}\n{"text": "a", "label": 2}\n',
        "x.jsonl:1: field 'text' is only white",
    ),
    "empty file": ("classification", "x.jsonl", b"", "x.jsonl: holds no records"),
    "empty table": ("classification", "x.csv", b"text,label\n", "x.csv: holds no records"),
    "no header": ("classification", "x.tsv", b"", "x.tsv: empty file; expected a header line"),
    "NaN": ("regression", "x.jsonl", b'{"text": "a", "score": NaN}\n', "x.jsonl:1: field 'score' is nan (float)"),
    "nan as text": ("regression", "x.csv", b"text,label\na,1\nb,nan\n", "x.csv:3: field 'label' is 'nan' (str)"),
    "infinity": (
        "regression",
        "x.jsonl",
        b'{"text": "a", "score": 1e999}\n',
        "x.jsonl:1: field 'score' is inf (float)",
    ),
    "null": ("regression", "x.jsonl", b'{"text": "a", "score": null}\n', "x.jsonl:1: field 'score' is missing"),
    "null text": (
        "regression",
        "x.jsonl",
        b'{"text": null, "score": 1}\n',
        "x.jsonl:1: field 'text' is missing (it is",
    ),
    "half a pair": (
        "classification",
        "x.jsonl",
        b'{"text": "a", "label": "\\ud83d"}\n{"text": "a", "label": "b"}\n',
        "x.jsonl:1: field 'label' holds '\\ud83d', half of a surrogate pair",
    ),
    "latin-1": ("classification", "x.csv", b"text,label\ncaf\xe9,up\n", "x.csv:2: byte 0xe9 is not UTF-8"),
    "utf-16": ("classification", "x.csv", "text,label\na,b\n".encode("utf-16"), "x.csv:1: byte 0xff is not UTF-8"),
    "utf-16 without a mark": (
        "classification",
        "x.csv",
        "text,label\na,b\n".encode("utf-16-le"),
        "x.csv:1: a NUL byte",
    ),
    "a tag too few": (
        "token-classification",
        "x.jsonl",
        b'{"tokens": ["a", "b"], "tags": ["O"]}\n',
        "x.jsonl:1: field",
    ),
    "an answer elsewhere": (
        "question-answering",
        "x.jsonl",
        b'{"question": "who ?", "context": "it was Ada .", "answers": "Bob"}\n',
        "x.jsonl:1: field 'answers' holds 'Bob' (str), which the context does not contain",
    ),
    "a choice too far": (
        "multiple-choice",
        "x.jsonl",
        b'{"premise": "a", "choices": ["b", "c"], "label": 2}\n',
        "x.jsonl:1: field 'label' is 2 (int); expected an integer from 0 to 1",
    ),
    "a wrong shape": (
        "multiple-choice",
        "x.jsonl",
        b'{"premise": "a", "choices": "b", "label": 0}\n',
        "field 'choices'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_data(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    task, name, content, message = CASES[case]
    (tmp_path / name).write_bytes(content)
    refused(bert, tmp_path, capsys, message, "--task", task, "--train", str(tmp_path / name))


@pytest.mark.parametrize(
    ("task", "train", "content", "message"),
    [
        (
            "classification",
            GOOD,
            b"text,label\na,up\nb,sideways\n",
            "x.csv:3: field 'label' has the unknown label 'sideways'",
        ),
        (
            "classification",
            GOOD,
            b"text,label\na,Up\n",
            "x.csv:2: field 'label' has the unknown label 'Up'; known: down, up",
        ),
        ("classification", GOOD, b"text,label\n", "x.csv: holds no records"),
        ("classification", GOOD, b"text,label\na,\n", "x.csv:2: field 'label' is missing"),
    ],
)
@pytest.mark.parametrize("flag", ["--eval", "--ood"])
def test_a_label_that_training_has_not_seen(bert, tmp_path, capsys, task, train, content, message, flag):
    (tmp_path / "train.csv").write_bytes(train)
    (tmp_path / "x.csv").write_bytes(content)
    files = ["--train", str(tmp_path / "train.csv"), flag, str(tmp_path / "x.csv")]
    refused(bert, tmp_path, capsys, message, "--task", task, *files)


def test_a_tag_that_training_has_not_seen(bert, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(TAGS)
    (tmp_path / "x.jsonl").write_text(TAGS + TAGS.replace("WHO", "PLACE"))
    files = ["--train", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "x.jsonl")]
    refused(
        bert,
        tmp_path,
        capsys,
        "x.jsonl:2: field 'tags[0]' has the unknown label 'B-PLACE'; known: B-WHO, O; train with "
        "--labels to name labels that the training data lacks",
        "--task",
        "token-classification",
        *files,
    )


def test_a_known_set_without_a_column(bert, tmp_path, capsys):
    (tmp_path / "mrpc").mkdir()
    sets.write(tmp_path / "mrpc" / "train.jsonl", [{"sentence1": "a", "label": "x"}])
    refused(bert, tmp_path, capsys, "mrpc/train.jsonl:1: no column 'sentence2'", "--data", str(tmp_path / "mrpc"))


def refused(bert: str, folder: Path, capsys: pytest.CaptureFixture[str], message: str, *flags: str) -> None:
    """One line, exit code 2, and the folder as it was."""
    before = sorted(folder.rglob("*"))
    assert main(["train", "--backbone", bert, "--out", str(folder / "delta"), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
