from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bertology_serve.cli.main import main
from tests import tiny
from tests.training import sets


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT, and pairs without scores."""
    folder = tmp_path_factory.mktemp("mine")
    tiny.save("bert", folder / "bert")
    sets.write(folder / "pairs.jsonl", [{"q": f"the {thing}", "a": f"a {thing}"} for thing in sets.THINGS])
    return folder


def command(made: Path, *more: str) -> list[str]:
    return ["mine-negatives", "--input", str(made / "pairs.jsonl"), "--columns", "text=q,text_pair=a", *more]


def test_pairs_become_triplets_that_train_evaluate_and_mine_again(made, tmp_path, capsys):
    out, delta = str(tmp_path / "triplets.jsonl"), str(tmp_path / "near")
    assert main(command(made, "--backbone", str(made / "bert"), "--output", out, "--negatives", "2")) == 0
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [len(row["negatives"]) for row in rows] == [2] * 4
    assert all(row["positive"] not in row["negatives"] for row in rows)
    assert capsys.readouterr().err.startswith("8 negatives for 4 of 4 pairs\n")
    train = ["train", "--backbone", str(made / "bert"), "--task", "embedding", "--train", out, "--eval", out]
    prompts = ["--prompt-query", "the question ? ", "--prompt-document", "the answer . "]
    assert main([*train, "--out", delta, "--epochs", "2", "--matryoshka", "16,8", *prompts]) == 0
    table, notes = capsys.readouterr()
    assert "loss mnrl" in notes
    assert all(name in table for name in ("ndcg@10", "triplet_accuracy", "ndcg@10_8", "cosine"))
    told = json.loads((tmp_path / "near" / "delta.json").read_text())
    assert told["task"]["dimensions"] == [16, 8]
    assert told["task"]["prompts"] == [["query", "the question ? "], ["document", "the answer . "]]
    lows, highs = np.array(told["task"]["ranges"])
    assert lows.shape == (32,)
    assert (lows >= -1).all()
    assert (lows < highs).all()
    assert told["metrics"]["ndcg@10"] >= told["provenance"]["baselines"]["cosine"]["ndcg@10"] - 1e-9
    assert main(["evaluate", delta, "--input", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"] == pytest.approx(told["metrics"], abs=1e-5)
    assert found["baselines"]["cosine"]["value"] == pytest.approx(
        told["provenance"]["baselines"]["cosine"]["ndcg@10"], abs=1e-6
    )
    assert main(command(made, "--delta", delta, "--output", str(tmp_path / "again.jsonl"), "--max-score", "-2")) == 0
    assert (tmp_path / "again.jsonl").read_text() == ""


def test_nothing_is_written_over_or_without_pairs(made, tmp_path, capsys):
    there = tmp_path / "there.jsonl"
    there.write_text("x")
    encoder = ("--backbone", str(made / "bert"))
    lone = sets.write(tmp_path / "lone.jsonl", [{"id": 1, "text": "the film"}])
    for more, message in (
        ((*encoder, "--output", str(there)), "there.jsonl exists; choose another --output"),
        (("--output", str(tmp_path / "x")), "give --backbone, to search by an encoder, or --delta"),
        ((*encoder, "--output", str(tmp_path / "x"), "--range-max", "0"), "ranks from 0 to 0 are none"),
        ((*encoder, "--output", str(tmp_path / "x"), "--columns", "text=text", "--input", lone), "lone.jsonl:1: field"),
    ):
        assert main(command(made, *more)) == 2
        assert message in capsys.readouterr().err
    assert there.read_text() == "x"
    assert [path.name for path in tmp_path.iterdir() if path.name == "x"] == []
