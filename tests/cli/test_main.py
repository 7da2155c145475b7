from __future__ import annotations

import json
import os
import pty
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import bertology_serve
from bertology_serve.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertology-serve {bertology_serve.__version__}\n"


def test_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("bertology_serve", run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"bertology-serve {bertology_serve.__version__}\n"


def test_alone_it_greets_with_three_commands(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("  bertology-serve ")]
    assert (len(shown), set(shown) <= set(COMMANDS), err) == (3, True, "")
    assert "--help" in out


@pytest.mark.parametrize("arguments", [["-h"], ["--help"]])
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


WRONG = [
    ["train", "--backbone", "minilm", "--task", "classification", "--train", "none.csv", "--out", "new"],
    ["train", "--backbone", "./none", "--task", "classification", "--train", "README.md", "--out", "new"],
    ["train", "--backbone", "minilm", "--task", "clasification", "--train", "none.csv", "--out", "new"],
    ["train", "--backbone", "minilm", "--task", "classification", "--train", "none.csv"],
    ["train-fleet", "none.toml", "--out", "new"],
    ["compress", "none", "--rank", "8", "--out", "new"],
    ["reproduce", "none", "--out", "new"],
    ["mine-negatives", "--backbone", "minilm", "--input", "none.jsonl", "--output", "new.jsonl"],
    ["convert", "none", "--backbone", "minilm", "--out", "new"],
    ["evaluate", "none", "--input", "none.jsonl"],
    ["ask", "none", "text"],
    ["ask", ".", "text", "--device", "gpu"],
    ["predict", "--backbone", "minilm", "--deltas", "none", "--input", "-", "--output", "-"],
    ["predict", "--backbone", "minilm", "--deltas", ".", "--input", "none", "--output", "-"],
    ["serve", "--backbone", "minilm", "--deltas", "none"],
    ["serve", "--backbone", "minilm", "--deltas", ".", "--engine", "fast"],
    ["export", "none", "--out", "new"],
    ["export", ".", "--verify", "none.jsonl", "--out", "new"],
    ["analyze", "heads", "--delta", "none", "--input", "none.jsonl"],
    ["analyze", "compare", "--first", ".", "--second", "none", "--input", "none.jsonl"],
    ["inspect", "none"],
    ["push", "none", "owner/name"],
    ["bench", "cpu", "--delta", "none"],
]


def test_wrong_input_is_found_before_torch_is_imported():
    code = (
        "import json, sys; from bertology_serve.cli.main import main; "
        "told = [[main(one), 'torch' in sys.modules] for one in json.load(sys.stdin)]; print(json.dumps(told))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, input=json.dumps(WRONG), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    told = dict(zip(map(" ".join, WRONG), json.loads(run.stdout), strict=True))
    assert {line: found for line, found in told.items() if found != [2, False]} == {}
    assert run.stderr.count("error: ") == len(WRONG)


def test_what_takes_seconds_is_said_at_once_on_a_terminal():
    """Whoever looks at a terminal sees something before torch is there; a pipe gets the answer alone."""
    code = (
        "import sys; from bertology_serve.cli.common import load_library; "
        "load_library(); assert 'torch' in sys.modules; print('done')"
    )
    main_end, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=end, stderr=end)
    os.close(end)
    seen = b""
    try:
        while piece := os.read(main_end, 4096):
            seen += piece
    except OSError:  # the other end has closed
        pass
    os.close(main_end)
    assert process.wait(60) == 0
    assert 0 <= seen.index(b"loading torch") < seen.index(b"done")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
