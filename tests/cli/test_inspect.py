from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT and two deltas of it."""
    folder = tmp_path_factory.mktemp("inspect")
    encoder: Encoder = tiny.encoder("bert", folder / "bert")
    task = TaskSpec("classification", ("down", "up"), 32)
    for name in ("mood", "tone"):
        delta = tiny.delta(encoder, name, [Lora(rank=2)], task)
        store.save(delta, folder / "deltas" / name, encoder.anatomy, encoder.config.to_dict())
    return folder


def test_shows_kinds_task_base_and_files(made, capsys):
    assert main(["inspect", str(made / "deltas" / "mood")]) == 0
    out = capsys.readouterr().out
    for text in ("specs.lora.rank", "query, value", "down, up", "base.sha256", "adapter_model.safetensors"):
        assert text in out


def test_json_of_one_and_of_many(made, capsys):
    assert main(["inspect", str(made / "deltas" / "mood"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["valid"], facts["peft"]) == ("mood", True, True)
    assert facts["parameters"] == {"delta": 3 * 2 * 2 * 64, "head": 66}
    assert main(["inspect", str(made / "deltas"), "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["mood", "tone"]


def test_checks_against_an_encoder(made, tmp_path, capsys):
    assert main(["inspect", str(made / "deltas" / "mood"), "--backbone", str(made / "bert")]) == 0
    other = tiny.save("bert", tmp_path / "other", seed=1)
    capsys.readouterr()
    assert main(["inspect", str(made / "deltas" / "mood"), "--backbone", other]) == 2
    assert "was made for" in capsys.readouterr().err


def test_damage_is_one_line(made, tmp_path, capsys):
    copy = tmp_path / "mood"
    copy.mkdir()
    for path in (made / "deltas" / "mood").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert main(["inspect", str(copy)]) == 2
    err = capsys.readouterr().err
    assert "is truncated" in err
    assert err.count("\n") == 1


def test_nothing_there(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no delta in" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "missing")]) == 2
    assert "no directory" in capsys.readouterr().err
