from __future__ import annotations

import json

import pytest

from bertology_serve.cli.main import main


def test_one_figure_in_a_table_and_a_file(encoder, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--quick", "--only", "9", "--backbone", encoder.name, "--check", "--output", str(path)]
    assert main(["prove", *options]) == 0
    out, err = capsys.readouterr()
    assert "hung up" in out
    assert "holds" in out
    assert "cores" in err
    (line,) = json.loads(path.read_text())["figures"]
    assert (line["number"], line["holds"]) == (9, True)


def test_a_server_of_its_own_drains(encoder, tmp_path):
    """Through a real process and SIGTERM."""
    path = tmp_path / "out.json"
    assert main(["prove", "--quick", "--only", "7", "--backbone", encoder.name, "--output", str(path)]) == 0
    (line,) = json.loads(path.read_text())["figures"]
    assert line["facts"]["answered"] > 0
    assert "lost" not in line["facts"], line


def test_a_broken_promise_is_an_error_when_asked(encoder, monkeypatch, capsys):
    monkeypatch.setattr("bertology_serve.serving.service.Service._cancel", lambda *_: None)
    assert main(["prove", "--quick", "--only", "9", "--backbone", encoder.name, "--check"]) == 1
    assert "error: missed: figures 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [(("--only", "77"), "expected some of 1"), (("--output", "x.txt"), ".json")]
)
def test_bad_options(options, message, capsys):
    assert main(["prove", *options]) == 2
    assert message in capsys.readouterr().err
