"""``bertology-serve doctor`` on machines that it is told of."""

from __future__ import annotations

import json

import pytest

from bertology_serve.cli.main import main
from bertology_serve.export import installation
from bertology_serve.export.installation import Machine
from bertology_serve.families import compat
from tests import tiny

BOTH = {"torch": "2.13", "triton": "3.9", "onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}


@pytest.fixture
def told(monkeypatch):
    """Says what machine this is."""
    return lambda installed: monkeypatch.setattr(
        installation, "look", lambda: Machine(installed=installed, provider="CPUExecutionProvider")
    )


def test_exit_code_1_where_something_is_broken(told, capsys):
    told(BOTH)
    assert main(["doctor"]) == 1
    printed, said = capsys.readouterr()
    assert said == ""
    assert printed.splitlines()[1].startswith("broken  onnxruntime: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 ")


def test_notes_are_not_broken(told, capsys):
    told({name: version for name, version in BOTH.items() if name != "onnxruntime-gpu"})
    assert main(["doctor"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["note", "ok", "ok", "ok"]


def test_an_encoder_says_whether_its_rows_are_packed(told, tmp_path, monkeypatch, capsys):
    told({"torch": "2.13", "triton": "3.9", "onnxruntime": "1.32.0"})
    path = tiny.save("bert", tmp_path)
    assert main(["doctor", "--backbone", path]) == 0
    assert f"ok      encoder {path}: bert, 3 layers, packed" in capsys.readouterr().out
    monkeypatch.setattr(compat, "connect", lambda *_: False)
    assert main(["doctor", "--backbone", path]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"note    encoder {path}: bert, 3 layers, padded: its attention does not go through")


def test_json(told, capsys):
    told(BOTH)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {"state", "what", "found", "mend"} == set(found[1])
    assert [one["what"] for one in found if one["state"] == "broken"] == ["onnxruntime"]


def test_this_machine(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok      onnxruntime: onnxruntime") for line in lines)
    assert all(line.split()[0] in ("ok", "note", "broken") for line in lines)
