from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from tests import tiny
from tests.training import sets


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def mrpc(tmp_path: Path) -> Path:
    """A folder that is called as a known set."""
    folder = tmp_path / "data" / "mrpc"
    folder.mkdir(parents=True)
    names = {"up": "equivalent", "down": "not"}
    rows = [{"text_a": row["text"], "text_b": "a film", "label": names[row["label"]]} for row in sets.classification()]
    for split in ("train", "dev"):
        sets.write(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    "own", [["--dropout", "0.2", "--targets", "query,value"], ["--recipe", "eh-ft", "--method", "bitfit"]]
)
def test_a_run_s_config_gives_the_same_bits(bert, tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path)
    sets.write(tmp_path / "train.jsonl", sets.classification())
    flags = ["--backbone", bert, "--task", "classification", "--train", "train.jsonl", "--eval", "train.jsonl"]
    more = ["--epochs", "2", "--batch-size", "4", "--seed", "3", "--warmup", "0.2", *own]
    assert main(["train", *flags, *more, "--out", "first"]) == 0
    config = tmp_path / "first" / "config.toml"
    assert tomllib.loads(config.read_text())["train"] == str(tmp_path / "train.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--config", str(config), "--out", "second"]) == 0
    again = tmp_path / "elsewhere" / "second"
    for path in sorted((tmp_path / "first").glob("*.safetensors")):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert (again / "config.toml").read_text() == config.read_text()
    assert main(["train", "--config", str(config), "--out", "third", "--seed", "4", "--dry-run"]) == 0


def test_labels_with_commas_come_back_from_the_file(bert, tmp_path):
    names = {"up": "yes, gladly", "down": 'no "never"'}
    rows = [{"body": row["text"], "label": names[row["label"]]} for row in sets.classification()]
    train = sets.write(tmp_path / "train.jsonl", rows)
    flags = ["--backbone", bert, "--task", "classification", "--train", train, "--max-steps", "1"]
    more = ["--columns", "text=body", "--labels", '"yes, gladly","no ""never"""']
    assert main(["train", *flags, *more, "--out", str(tmp_path / "first")]) == 0
    assert main(["train", "--config", str(tmp_path / "first" / "config.toml"), "--out", str(tmp_path / "second")]) == 0
    for name in ("first", "second"):
        assert json.loads((tmp_path / name / "delta.json").read_text())["task"]["labels"] == list(names.values())
    own = tmp_path / "own.toml"
    own.write_text('columns = { text = "body" }\n')
    assert main(["train", "--config", str(own), *flags, "--out", str(tmp_path / "third")]) == 0


def test_a_flag_counts_before_the_file(bert, tmp_path, capsys):
    train = sets.write(tmp_path / "train.jsonl", sets.classification())
    path = tmp_path / "own.toml"
    path.write_text(f'backbone = {json.dumps(bert)}\ntask = "classification"\nmethod = ["bitfit"]\nbatch-size = 4\n')
    assert main(["train", "--config", str(path), "--train", train, "--method", "lora", "--rank", "2", "--dry-run"]) == 0
    assert "│ lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3\n", "own.toml: train has no flag 'epoch'; did you mean 'epochs'"),
        ("epochs = \n", "own.toml: not TOML"),
        ("epochs = 3\n", "Missing option"),
        (None, "own.toml; give a TOML file"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_known_set_is_trained_and_measured_by_its_name(bert, mrpc, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BERTOLOGY_DATA", str(mrpc.parent))
    out = tmp_path / "x"
    assert main(["train", "--backbone", bert, "--data", "glue/mrpc", "--epochs", "1", "--out", str(out)]) == 0
    notes = capsys.readouterr().err
    assert f"bertology-serve evaluate {out} --input set:glue/mrpc:dev" in notes
    assert main(["evaluate", str(out), "--input", "set:glue/mrpc:dev", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["metrics"])[:2] == ["accuracy", "f1"]
    (mrpc / "dev.jsonl").unlink()
    assert main(["train", "--backbone", bert, "--data", str(mrpc), "--epochs", "1", "--out", str(tmp_path / "y")]) == 0
    assert "--input FILE" in capsys.readouterr().err, "this folder has nothing to measure on"
    assert main(["train", "--backbone", bert, "--data", "glue/mprc", "--out", str(tmp_path / "z")]) == 2
    assert "the data set 'glue/mprc' is unknown; did you mean 'glue/mrpc'" in capsys.readouterr().err
