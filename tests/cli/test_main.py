from __future__ import annotations

import runpy
import sys

import pytest

import bertology_serve
from bertology_serve.cli.main import COMMANDS, main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertology-serve {bertology_serve.__version__}\n"


def test_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("bertology_serve", run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"bertology-serve {bertology_serve.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_in_order(arguments, capsys):
    assert main(arguments) == 0
    listed = capsys.readouterr().out.split("Commands:")[1].split("\n")
    rows = [line.split(maxsplit=1) for line in listed if line.startswith("  ") and not line.startswith("   ")]
    assert {row[0]: row[1] for row in rows} == COMMANDS
    assert [row[0] for row in rows] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_of_its_own(name, capsys):
    assert main([name, "--help"]) == 0
    usage, text = capsys.readouterr().out.split("\n\n")[:2]
    assert usage.startswith(f"Usage: bertology-serve {name} ")
    assert text.strip().endswith(".")


def test_unknown_command_names_the_nearest_in_one_line(capsys):
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: No such command 'trian'. Did you mean 'train'?")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_is_one_line_and_says_where_to_look(name, capsys):
    assert main([name, "--xyzzy"]) == 2
    err = capsys.readouterr().err
    assert err == f"error: No such option: --xyzzy (see bertology-serve {name} --help)\n"
