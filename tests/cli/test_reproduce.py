from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from bertology_serve.errors import SpecError
from bertology_serve.training.grids import grid_run as runs
from tests import tiny
from tests.training import sets

GRID = """
title = "Ranks"
backbone = "BACKBONE"
[train]
max_length = 16
epochs = 1
keep = "last"
[[tasks]]
name = "Mood"
task = "classification"
train = "mood.jsonl"
eval = "mood.jsonl"
metric = "accuracy"
[[methods]]
name = "LoRA"
train = { method = "lora" }
vary = { rank = [1, 2] }
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A grid of two runs, and its data."""
    sets.write(tmp_path / "mood.jsonl", sets.classification())
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace("BACKBONE", tiny.save("bert", tmp_path / "bert")), encoding="utf-8")
    return path


def arguments(grid: Path, *more: str) -> list[str]:
    return ["reproduce", str(grid), "--data", str(grid.parent), "--out", str(grid.parent / "out"), *more]


def test_runs_once_and_then_only_what_is_missing(grid, capsys):
    assert main(arguments(grid, "--dry-run")) == 0
    assert "2 runs: Ranks" in capsys.readouterr().out
    assert main(arguments(grid)) == 0
    out, notes = capsys.readouterr()
    assert "| LoRA, rank 2 | 768 |" in out
    assert notes.startswith("0 of 2 runs are there\nmood/lora-rank-1/seed-0: Mood ")
    assert (grid.parent / "out" / "table.md").exists()
    grid.write_text(grid.read_text().replace("[1, 2]", "[1, 2, 4]"))
    assert main(arguments(grid, "--table")) == 0
    assert "| LoRA, rank 4 | – |" in capsys.readouterr().out
    assert main(arguments(grid)) == 0
    assert capsys.readouterr().err.startswith("2 of 3 runs are there\nmood/lora-rank-4")


def test_a_run_that_explodes_is_named_and_the_others_are_made(grid, capsys, monkeypatch):
    def execute(run, place):
        if run.values["rank"] == 1:
            raise SpecError("step 3: the loss is nan")
        return whole(run, place)

    whole = runs.execute
    monkeypatch.setattr(runs, "execute", execute)
    assert main(arguments(grid)) == 2
    out, err = capsys.readouterr()
    assert "mood/lora-rank-1/seed-0: step 3: the loss is nan" in err
    assert "error: 1 of 2 runs failed and are not in the table: mood/lora-rank-1/seed-0" in err
    assert "| LoRA, rank 1 | – |" in out
    assert "| LoRA, rank 2 | 768 |" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["reproduce"], "no grid was given; name a TOML file"),
        (["reproduce", "minilmm"], "no grid 'minilmm'; did you mean 'minilm'"),
        (["reproduce", "minilm"], "no --out was given"),
        (["reproduce", "minilm", "--methods", "lore", "--dry-run"], "the grid has no 'lore'; did you mean 'lora'"),
    ],
)
def test_bad_input_is_one_line(capsys, more, message):
    assert main(more) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_packaged_grids_are_listed(capsys):
    assert main(["reproduce", "--list"]) == 0
    assert "minilm" in capsys.readouterr().out
