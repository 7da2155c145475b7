from __future__ import annotations

import io
import sys

import pytest

from bertology_serve.cli.common import complain, note, progress, table
from bertology_serve.errors import DataError, NotFound, VerificationError

FAULT_LINE = "error: unexpected KeyError: 'x' (this is a fault; BERTOLOGY_DEBUG=1 shows where)\n"


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (DataError("a.jsonl:3: got no text;\n  expected one"), 2, "error: a.jsonl:3: got no text; expected one\n"),
        (NotFound("no delta 'x'"), 2, "error: no delta 'x'\n"),
        (VerificationError("differs by 0.1"), 1, "error: differs by 0.1\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: No such file or directory: a.txt\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (KeyError("x"), 70, FAULT_LINE),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_is_one_line_and_has_its_exit_code(problem, code, line, capsys):
    assert complain(problem) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(("debug", "shown"), [("", False), ("0", False), ("1", True)])
def test_traceback_only_when_asked_for(debug, shown, monkeypatch, capsys):
    monkeypatch.setenv("BERTOLOGY_DEBUG", debug)
    complain(DataError("bad"))
    assert ("DataError: bad" in capsys.readouterr().err) == shown


def test_table_goes_to_stderr_unless_it_is_the_result(capsys):
    rows = [["sst2", 0.81234567, 872], ["a [bold] name", 1.0, 7]]
    table("Metrics", ["set", "accuracy", "rows"], rows)
    out, err = capsys.readouterr()
    assert out == ""
    assert "0.8123 " in err
    assert "a [bold] name" in err
    assert "\x1b" not in err
    table("Metrics", ["set", "accuracy", "rows"], rows, stderr=False)
    assert capsys.readouterr() == (err, "")


def test_table_without_rows(capsys):
    table("Nothing", ["name"], [])
    assert "Nothing" in capsys.readouterr().err


def test_note_is_one_line_on_stderr(capsys):
    note("saved")
    assert capsys.readouterr() == ("", "saved\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "seen"), [(io.StringIO(), False), (Terminal(), True)], ids=["pipe", "terminal"])
def test_progress_is_drawn_on_terminals_only(stream, seen, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("loss") as bar:
        task = bar.add_task("training", total=2, loss="")
        bar.update(task, advance=2, loss="0.412")
    assert ("loss 0.412" in stream.getvalue()) == seen
    assert bool(stream.getvalue()) == seen
