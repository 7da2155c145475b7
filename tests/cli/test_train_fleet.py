from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.cli.main import main
from tests import tiny
from tests.training import sets

FILE = """
[all]
task = "classification"
train = "mood.jsonl"
eval = "mood.jsonl"
epochs = 1
batch_size = 3
max_length = 32
start = "random"

[delta.mood]
grid.rank = [2, 4]

[delta.tone]
method = "bitfit,prompt"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    sets.write(tmp_path / "mood.jsonl", sets.classification())
    (tmp_path / "fleet.toml").write_text(FILE)
    tiny.save("bert", tmp_path / "bert")
    return tmp_path


def test_a_fleet_is_trained_and_shown(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["train-fleet", "fleet.toml", "--backbone", "bert", "--out", "deltas"]) == 0
    shown = capsys.readouterr()
    assert sorted(path.name for path in (place / "deltas").iterdir()) == ["mood-2", "mood-4", "tone"]
    assert "mood-4, step 6: accuracy" in shown.err
    assert "tone: saved; the saved copy differs by" in shown.err
    assert "bertology-serve serve --backbone bert --deltas deltas" in shown.err
    assert "bitfit + prompt" in shown.out
    assert main(["train-fleet", "fleet.toml", "--backbone", "bert", "--out", "deltas"]) == 2
    assert "mood-2 exists" in capsys.readouterr().err


def test_the_board_shows_the_metric_that_chooses(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    sets.write(place / "names.jsonl", sets.token_classification())
    one = 'task = "token-classification"\ntrain = "names.jsonl"\neval = "names.jsonl"\nepochs = 1\n'
    (place / "fleet.toml").write_text(f"[delta.names]\n{one}")
    boards = []
    monkeypatch.setattr("bertology_serve.cli.train_fleet.Board.__exit__", lambda board, *_: boards.append(board))
    assert main(["train-fleet", "fleet.toml", "--backbone", "bert", "--out", "my deltas"]) == 0
    (board,) = boards
    assert board.rows["names"][5].startswith("f1 ")
    assert "bertology-serve serve --backbone bert --deltas 'my deltas'" in capsys.readouterr().err


def test_dry_run_counts(place, capsys):
    assert main(["train-fleet", str(place / "fleet.toml"), "--backbone", str(place / "bert"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would train 3 deltas together" in shown
    assert next(line for line in shown.splitlines() if "mood-2" in line).split("│")[4].strip() == "768"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "deltas"], "names no backbone"),
        (["--backbone", "bert"], "no --out was given"),
    ],
)
def test_what_lacks_is_said(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    assert main(["train-fleet", "fleet.toml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_board_changes_in_place_on_a_terminal(monkeypatch):
    from rich.console import Console

    from bertology_serve.cli import train_fleet
    from bertology_serve.training.methods import ParameterCount

    console = Console(force_terminal=True, width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr("bertology_serve.cli.common.console_of", lambda stderr: console)
    with train_fleet.Board() as board:
        board.joined("mood", 0, 8, ParameterCount(700, 70, 9000))
        board.stepped("mood", {"step": 1, "loss": 1.0, "tokens_per_s": 1234.5})
        board.stepped("mood", {"step": 2, "loss": 2.0, "tokens_per_s": 1234.5})
        board.evaluated("mood", {"step": 2, "eval": {"accuracy": 0.75, "loss": 1.0}})
        board.joined("sick", 3, 8, ParameterCount(700, 70, 9000))
        board.failed("sick", "step 4: nan")
        board.published("mood", 1e-7)
    console.file.close()
    text = console.export_text()
    assert "sick: given up at step 4: nan" in text
    assert board.rows["mood"] == ["mood", "770", "2/8", "1.050", "1,234", "accuracy 0.7500", "saved"]
    assert [column.header for column in board.drawn().columns] == list(train_fleet.Board.COLUMNS)
