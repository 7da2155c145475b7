from __future__ import annotations

import json

import pytest

from bertology_serve.bench.export import export_run
from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.kinds.lora import Lora
from tests import tiny
from tests.export.cases import CLASSES


@pytest.fixture
def mood(tmp_path, monkeypatch):
    """A delta's directory, on a small encoder; small batches."""
    monkeypatch.setattr(export_run, "FULL", ((8, 16),))
    monkeypatch.setattr(export_run, "EXPORTS", 2)
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "mood", [Lora(rank=2)], CLASSES)
    store.save(delta, tmp_path / "mood", encoder.anatomy, encoder.config.to_dict())
    return tmp_path / "mood"


def test_tables_files_and_bars(mood, tmp_path, capsys):
    rows = [{"text_a": "the bad cat " * (1 + 3 * (i % 3 == 0)), "y": CLASSES.labels[i % 3]} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["--data", str(tmp_path / "d.jsonl"), "--columns", "text=text_a,label=y"]
    out = tmp_path / "out"
    arguments = ["bench", "export", "--delta", str(mood), *named, "--no-compile", "--rounds", "2", "--output", str(out)]
    assert main([*arguments, "--olive", str(tmp_path / "none")]) == 0
    printed, said = capsys.readouterr()
    assert "│ ours, unpadded, int8-row " in printed
    assert "forms whose bytes differ between exports" in printed
    assert "no virtual environment for Olive at" in said
    assert "optimum O0 and optimum O3: no --optimum was given" in said
    assert {path.name for path in out.iterdir()} == {"export.md", "export.csv", "export.png"}


def test_a_metric_needs_a_delta(capsys):
    assert main(["bench", "export", "--data", "x.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: --data was given without --delta; ")
