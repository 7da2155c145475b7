from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertology_serve.analysis import figures
from bertology_serve.cli.main import main
from tests import tiny
from tests.training import sets


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT, its data, and a delta trained on it."""
    folder = tmp_path_factory.mktemp("analyze")
    bert = tiny.save("bert", folder / "bert")
    train = sets.write(folder / "train.jsonl", sets.classification())
    sets.write(folder / "tags.jsonl", sets.token_classification())
    command = ["train", "--backbone", bert, "--task", "classification", "--train", train]
    assert main([*command, "--out", str(folder / "mood"), "--epochs", "1"]) == 0
    return folder


def test_attention_with_and_without_a_delta(made, tmp_path, capsys):
    arguments = ["analyze", "attention", "--corpus", str(made / "train.jsonl"), "--out", str(tmp_path)]
    assert main([*arguments, "--backbone", str(made / "bert"), "--clusters", "3"]) == 0
    out, err = capsys.readouterr()
    assert "entropy" in out
    assert "attention-heads.png" in err
    base = json.loads((tmp_path / "attention.json").read_text())
    assert main([*arguments, "--delta", str(made / "mood")]) == 0
    tuned = json.loads((tmp_path / "attention.json").read_text())
    assert (base["facts"]["delta"], tuned["facts"]["delta"]["name"]) == (None, "mood")
    assert {row["cluster"] for row in base["tables"]["heads"]} == {1, 2, 3}
    assert base["tables"]["heads"] != tuned["tables"]["heads"]


def test_the_same_analysis_is_read_back(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat was great\na dog\n")
    arguments = ["analyze", "attention", "--backbone", str(made / "bert"), "--corpus", str(corpus), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    first = (tmp_path / "out" / "attention.json").read_text()
    shown = capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "nothing changed" in err
    assert out == shown
    assert (tmp_path / "out" / "attention.json").read_text() == first
    assert main(["analyze", "draw", str(tmp_path / "out" / "attention.json"), "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "attention.html").read_text() == (tmp_path / "out" / "attention.html").read_text()
    for change in (["--again"], ["--clusters", "2"], ["--delta", str(made / "mood")]):
        capsys.readouterr()
        assert main([*arguments, str(tmp_path / "out"), *change]) == 0
        assert "nothing changed" not in capsys.readouterr().err
    corpus.write_text("the cat was great\na dog\nan early film\n")
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert "nothing changed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("corpus", "message"),
    [("", "holds no text"), ('{"number": 3}', "no text; expected a field text"), (None, "no file")],
)
def test_bad_corpora_are_one_line(made, tmp_path, capsys, corpus, message):
    path = tmp_path / ("corpus.txt" if corpus in ("", None) else "corpus.jsonl")
    if corpus is not None:
        path.write_text(corpus)
    arguments = ["--backbone", str(made / "bert"), "--corpus", str(path), "--out", str(tmp_path)]
    assert main(["analyze", "attention", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_heads(made, tmp_path, capsys):
    rows = str(made / "train.jsonl")
    arguments = ["--delta", str(made / "mood"), "--input", rows, "--eval", rows, "--out", str(tmp_path)]
    assert main(["analyze", "heads", *arguments, "--steps", "2", "--seeds", "1"]) == 0
    assert "least important first" in capsys.readouterr().out
    assert json.loads((tmp_path / "heads.json").read_text())["facts"]["eval_examples"] == 16


def test_prune_then_train_again(made, tmp_path, capsys):
    rows, small = str(made / "train.jsonl"), str(tmp_path / "small")
    arguments = ["--delta", str(made / "mood"), "--input", rows, "--out", str(tmp_path), "--rounds", "1"]
    assert main(["analyze", "prune", *arguments, "--save", small, "--heads", "0.5", "--neurons", "0.3"]) == 0
    shown = capsys.readouterr()
    assert "heads" in shown.out
    assert f"--backbone {small}" in shown.err
    command = ["train", "--backbone", small, "--task", "classification", "--train", rows, "--epochs", "1"]
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    for delta in (made / "mood", tmp_path / "again"):
        assert main(["evaluate", str(delta), "--input", rows, "--backbone", small]) == 0
    assert main(["analyze", "prune", *arguments, "--save", small]) == 2
    assert "exists already" in capsys.readouterr().err


def test_probe(made, tmp_path, capsys):
    arguments = ["--backbone", str(made / "bert"), "--input", str(made / "tags.jsonl"), "--out", str(tmp_path)]
    assert main(["analyze", "probe", *arguments, "--tasks", "tags,position", "--no-code"]) == 0
    assert "selectivity" in capsys.readouterr().out
    assert {row["task"] for row in json.loads((tmp_path / "probe.json").read_text())["tables"]["layers"]} == {
        "tags",
        "position",
    }


def test_distance(made, tmp_path, capsys):
    arguments = ["--delta", str(made / "mood"), "--corpus", str(made / "train.jsonl"), "--out", str(tmp_path)]
    assert main(["analyze", "distance", *arguments]) == 0
    assert "CKA" in capsys.readouterr().out
    held = json.loads((tmp_path / "distance.json").read_text())
    assert {row["slot"] for row in held["tables"]["weights"]} == {"query", "value"}
    assert main(["analyze", "distance", *arguments, "--beside", str(made / "mood")]) == 0
    assert "out_of_domain" in capsys.readouterr().out
    assert main(["analyze", "distance", "--delta", str(made / "nothing")]) == 2


def test_without_matplotlib_the_page_is_left(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bertology_serve.analysis.figures.available", lambda: False)
    arguments = ["--backbone", str(made / "bert"), "--corpus", str(made / "train.jsonl"), "--out", str(tmp_path)]
    assert main(["analyze", "attention", *arguments]) == 0
    assert "no PNG: matplotlib is missing" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_compare(made, tmp_path, capsys):
    rows = str(made / "train.jsonl")
    command = ["train", "--backbone", str(made / "bert"), "--task", "classification", "--train", rows, "--epochs", "1"]
    assert main([*command, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    pair = ["--first", str(made / "mood"), "--second", str(tmp_path / "other")]
    arguments = ["analyze", "compare", *pair, "--input", rows, "--out", str(tmp_path / "out"), "--steps", "4"]
    assert main([*arguments, "--shown", "1"]) == 0
    assert "agreement" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["facts"]["records"] == 16
