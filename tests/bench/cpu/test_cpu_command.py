from __future__ import annotations

import json

import pytest

from bertology_serve.bench.cpu import contenders
from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.kinds.lora import Lora
from tests import tiny
from tests.export.cases import CLASSES


@pytest.fixture
def mood(tmp_path, small):
    """A delta's directory, on a small encoder."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "mood", [Lora(rank=2)], CLASSES)
    store.save(delta, tmp_path / "mood", encoder.anatomy, encoder.config.to_dict())
    return tmp_path / "mood"


@pytest.mark.parametrize("command", ["cpu", "export"])
def test_tables_files_and_bars(command, mood, tmp_path, capsys):
    rows = [{"text_a": "the bad cat " * (1 + 3 * (i % 3 == 0)), "y": CLASSES.labels[i % 3]} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = ["bench", command, "--delta", str(mood), "--data", str(tmp_path / "d.jsonl"), "--rounds", "1"]
    arguments += [
        "--columns",
        "text=text_a,label=y",
        "--only",
        "again;unpadded, int8-row;olive;texts as",
        "--no-compile",
    ]
    assert main([*arguments, "--olive", str(tmp_path / "none"), "--output", str(out)]) == 0
    printed, said = capsys.readouterr()
    assert "│ ours, unpadded, int8-row " in printed
    assert "forms whose bytes differ between exports" in printed
    assert "missing: Olive: no environment 'olive' (torch==" in said
    names = {path.name for path in out.rglob("*.*")}
    assert names == {"index.md", *(f"base-mood.{end}" for end in ("jsonl", "md", "csv", "png"))}
    (out / "index.md").unlink()
    assert main(["bench", command, "--render", "--output", str(out)]) == 0
    assert "base-mood" in (out / "index.md").read_text()


def test_without_output_nothing_is_kept(mood, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["bench", "cpu", "--delta", str(mood), "--rounds", "1", "--only", "again;1x16"]) == 0
    assert set(tmp_path.iterdir()) == before


def test_environments_are_made_and_what_fails_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contenders, "make_environments", lambda directory, say: {"adapters": "no wheel"})
    assert main(["bench", "cpu", "--make-environments", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("error: adapters was not made: no wheel\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "x.jsonl"], "error: --data was given without --delta; "),
        (["--render"], "error: --render has nothing to read: got --output None, "),
        (["--only", "openwine"], "error: --only 'openwine' is in no name; workloads are 8x128; "),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said, capsys):
    assert main(["bench", "cpu", *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)
