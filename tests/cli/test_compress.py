from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from tests import tiny
from tests.training import sets


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a model that was fully tuned."""
    monkeypatch.chdir(tmp_path)
    tiny.save("bert", Path("bert"))
    sets.write(Path("mood.jsonl"), sets.classification())
    asked = "--backbone bert --task classification --method full --epochs 1 --max-length 32"
    assert main(["train", *asked.split(), "--train", "mood.jsonl", "--out", "whole"]) == 0
    return tmp_path


def test_a_tuned_model_becomes_a_small_delta(tuned, capsys):
    capsys.readouterr()
    asked = ["compress", "whole", "--rank", "2", "--eval", "mood.jsonl", "--out", "small", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["delta"], found["rank"]) == ("small", 2)
    assert found["bytes"][1] < 0.5 * found["bytes"][0]
    assert found["metrics"]["accuracy"][0] >= 0
    assert "embeddings.word_embeddings.weight" in found["dropped"]
    assert main(["evaluate", "small", "--input", "mood.jsonl", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["accuracy"] == found["metrics"]["accuracy"][1]
    assert main(asked) == 2
    assert "small exists; choose another --out" in capsys.readouterr().err


def test_energy_and_tables(tuned, capsys):
    assert main(["compress", "whole", "--energy", "0.5", "--out", "small"]) == 0
    shown = capsys.readouterr()
    assert "whole as rank" in shown.out
    assert "lora + bitfit + norms" in shown.out
    assert "energy kept" in shown.out
    assert "dropped: the largest" in shown.out
    assert "saved to small" in shown.err


def test_a_share_of_the_entries(tuned, capsys):
    capsys.readouterr()
    assert main(["compress", "whole", "--share", "0.05", "--per-tensor", "--out", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.05 < found["kept"]["all"] < 1
    assert main(["inspect", "small"]) == 0
    assert "sparse" in capsys.readouterr().out
    assert main(["compress", "whole", "--rank", "2", "--per-tensor", "--out", "other"]) == 2
    assert "per_tensor is for a share of the entries" in capsys.readouterr().err
