"""What ``--help`` shows of the commands with many options, where their values come from, and what a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from bertology_serve.cli.main import application, main

FLAG = re.compile(r"^  (?:-\w, )?(--[a-z][a-z0-9-]*)", re.MULTILINE)


def flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(arguments) == 0
    return FLAG.findall(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["serve", "train"])
def test_help_shows_what_people_use_and_help_all_the_rest(name, capsys):
    brief, whole = flags([name, "--help"], capsys), flags([name, "--help-all"], capsys)
    assert 12 <= len(brief) <= 20
    command = typer.main.get_command(application(name)).commands[name]  # type: ignore[attr-defined]
    assert sorted(whole) == sorted([*(param.opts[0] for param in command.params), "--help"])
    assert len(set(whole)) == len(whole)
    assert set(brief) < set(whole)


@pytest.mark.parametrize("name", ["serve", "train"])
def test_every_option_has_a_panel_and_every_name_of_the_layout_an_option(name):
    command = typer.main.get_command(application(name)).commands[name]  # type: ignore[attr-defined]
    layout = command.callback.layout
    panelled = {one for names in layout.panels.values() for one in names}
    own = {str(param.name): getattr(param, "rich_help_panel", None) for param in command.params}
    assert {one for one, panel in own.items() if panel is None and one not in panelled} == {"file", "help_all"}
    assert panelled | set(layout.common) <= own.keys()


def test_help_says_how_options_are_written_in_the_environment(capsys):
    assert main(["serve", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "more: --help-all Every option has a variable: BERTOLOGY_PORT for --port. A flag wins over the env" in words
    assert "env var" not in words


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr("bertology_serve.serving.serve.serve", lambda *args, **options: seen.append((args, options)))

    def start(*arguments: str) -> Any:
        assert main(["serve", *arguments]) == 0
        return seen.pop()

    return start


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(run, monkeypatch, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('max-items = 3\ngzip_bytes = 5\nweights = ["a=2", "b=3"]\nport = 1\n')
    given = ("--backbone", "minilm", "--deltas", "there", "--config", str(file))
    (_, _, config), _ = run(*given)
    assert (config.limits.max_items, config.listen.gzip_bytes, config.listen.port) == (3, 5, 1)
    assert config.batching.weights == ("a=2", "b=3")
    assert config.limits.max_item_tokens == type(config.limits)().max_item_tokens
    monkeypatch.setenv("BERTOLOGY_MAX_ITEMS", "4")
    monkeypatch.setenv("BERTOLOGY_PORT", "2")
    (_, _, config), _ = run(*given, "--port", "9")
    assert (config.limits.max_items, config.listen.gzip_bytes, config.listen.port) == (4, 5, 9)


def test_all_options_may_come_from_the_environment(run, monkeypatch):
    values = {"BACKBONE": "minilm", "DELTAS": "there", "SKIP_BAD_DELTAS": "1", "EXECUTOR": "process",
              "LOG_CALLS": "true", "CORS_ORIGIN": "https://a.example,https://b.example", "DEVICE_MB": "7"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(f"BERTOLOGY_{name}", value)
    (backbone, deltas, config), options = run()
    assert (backbone, deltas) == ("minilm", Path("there"))
    assert (options["skip_bad_deltas"], options["executor"]) == (True, "process")
    assert (config.logging.log_calls, config.deltas.device_mb) == (True, 7)
    assert config.listen.cors_origin == ("https://a.example", "https://b.example")


def test_a_variable_that_makes_no_sense_is_told_by_its_option(monkeypatch, capsys):
    monkeypatch.setenv("BERTOLOGY_PORT", "many")
    assert main(["serve", "--backbone", "minilm", "--deltas", "d"]) == 2
    assert "'--port'" in capsys.readouterr().err


def test_an_unknown_key_of_the_file_is_named(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("max-item = 3\n")
    assert main(["serve", "--backbone", "minilm", "--deltas", "d", "--config", str(tmp_path / "c.toml")]) == 2
    assert "serve has no flag 'max_item'; did you mean 'max_items'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [("bertology-serve ser", "serve"), ("bertology-serve serve --max-it", "--max-items"),
     ("bertology-serve train --learn", "--learning-rate")],
)  # fmt: skip
def test_a_shell_completes_commands_and_their_options(words, expected):
    environment = os.environ | {
        "_BERTOLOGY_SERVE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-c", "import sys; from bertology_serve.cli.main import main; sys.exit(main())"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert expected in found.stdout.split(), (found.stdout, found.stderr)


def test_errors_say_where_a_value_came_from(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    needed = ["--backbone", "minilm", "--deltas", str(tmp_path)]
    file = tmp_path / "serve.toml"
    file.write_text('port = "abc"\n')
    assert main(["serve", *needed, "--config", str(file)]) == 2
    assert f"from {file}: port = 'abc'" in capsys.readouterr().err
    file.write_text("max-items = 4\nmax_items = 5\n")
    assert main(["serve", *needed, "--config", str(file)]) == 2
    assert "max-items and max_items are one flag; give it once" in capsys.readouterr().err
    monkeypatch.setenv("BERTOLOGY_MAX_ITEMS", "-4")
    monkeypatch.setenv("BERTOLOGY_MAX_ITMES", "4")
    assert main(["serve", *needed]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: the variable BERTOLOGY_MAX_ITMES sets nothing; did you mean 'BERTOLOGY_MAX_IT")
    assert error == "error: max_items is -4; expected at least 1, from BERTOLOGY_MAX_ITEMS='-4'"
    assert main(["serve", *needed, "--max-items", "-5"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: max_items is -5; expected at least 1", "a flag"
