from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from io import BytesIO, TextIOWrapper

import pytest
import torch

from bertology_serve.cli.main import main
from tests.serving.conftest import RECORDS, deltas, encoder  # noqa: F401 - fixtures


@pytest.fixture
def predict(encoder, deltas, tmp_path):  # noqa: F811
    def run(*options: str, lines: bytes | None = None, source: str | None = None) -> int:
        path = tmp_path / "in.jsonl"
        if lines is not None:
            path.write_bytes(lines)
        arguments = ["predict", "--backbone", encoder.name, "--deltas", str(deltas), "--input", source or str(path)]
        return main([*arguments, *(options or ("--output", str(tmp_path / "out.jsonl")))])

    return run


def line(**fields):
    return json.dumps(fields).encode() + b"\n"


LINES = b"".join(line(delta=name, id=i, **record) for i, (name, record) in enumerate(RECORDS.items()))


def test_every_line_is_answered_in_order(predict, tmp_path, capsys):
    assert predict(lines=LINES) == 0
    answers = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(answer["id"], answer["delta"]) for answer in answers] == list(enumerate(RECORDS))
    assert all(answer["version"] for answer in answers)
    assert f"{len(RECORDS)} answers in" in capsys.readouterr().err


def test_from_standard_input_to_standard_output(predict, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(LINES)))
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO()))
    assert predict("--output", "-", "--logits", source="-") == 0
    answers = [json.loads(text) for text in sys.stdout.buffer.getvalue().splitlines()]
    assert [answer["delta"] for answer in answers] == list(RECORDS)
    assert all("logits" in answer for answer in answers)


def test_texts_that_are_cut_are_told(predict, tmp_path, capsys):
    tail = "Ada went to Paris"
    short, long = {"text": tail}, {"text": "the cat was good " * 40 + tail}
    assert predict(lines=line(delta="names", **short) + line(delta="names", **long)) == 0
    one, other = (json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines())
    assert not {"truncated", "tokens_read", "tokens_given"} & one.keys()
    assert (other["truncated"], other["tokens_read"], other["tokens_given"]) == (True, 32, 166)
    assert "warning: 1 of 2 texts were cut to their delta's max_length" in capsys.readouterr().err


def test_a_bad_line_leaves_no_output(predict, tmp_path, capsys):
    assert predict(lines=LINES + line(delta="mood", text="")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    number = len(RECORDS) + 1
    assert error.startswith(f"error: {tmp_path}/in.jsonl:{number}: field 'text' is empty")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_can_be_answered_with_their_error(predict, tmp_path):
    output = str(tmp_path / "out.jsonl")
    assert predict("--output", output, "--skip-bad", lines=b"{\n" + LINES) == 0
    first, *rest = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(first).keys() == {"error"}
    assert len(rest) == len(RECORDS)


def test_an_input_that_is_not_there_is_said_before_anything_is_loaded(predict, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bertology_serve.encoder.encoder", None)
    assert predict(source="/no/such/file") == 2
    assert "error: no file /no/such/file" in capsys.readouterr().err


def truncate(root):
    weights = root / "mood" / "1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])


def leave_a_pickle(root):
    (root / "mood" / "1" / "delta.json").unlink()
    (root / "mood" / "1" / "adapter_config.json").write_text("{}")
    (root / "mood" / "1" / "adapter_model.safetensors").rename(root / "mood" / "1" / "adapter_model.bin")


def point_outside(root):
    (root / "mood" / "1").rename(root.parent / "elsewhere")
    (root / "mood" / "1").symlink_to(root.parent / "elsewhere")


def trick_the_path(root):
    manifest = root / "mood" / "1" / "delta.json"
    manifest.write_text(manifest.read_text().replace('"mood"', '"../../mood"', 1))


def change_the_base(root):
    manifest = root / "mood" / "1" / "delta.json"
    facts = json.loads(manifest.read_text())
    facts["base"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "is truncated"),
        (leave_a_pickle, "adapter_model.bin, a pickle"),
        (point_outside, "points outside"),
        (trick_the_path, "'../../mood' cannot be used"),
        (change_the_base, "(weights 000000000000), but the encoder is"),
    ],
)
def test_bad_deltas_are_one_line_and_code_2(encoder, deltas, tmp_path, capsys, spoil, message):  # noqa: F811
    shutil.copytree(deltas / "mood", tmp_path / "deltas" / "mood")
    spoil(tmp_path / "deltas")
    arguments = ["--backbone", encoder.name, "--deltas", str(tmp_path / "deltas"), "--output", str(tmp_path / "out")]
    (tmp_path / "in.jsonl").write_bytes(LINES)
    assert main(["predict", *arguments, "--input", str(tmp_path / "in.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_line_without_an_end_is_refused(predict, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("bertology_serve.data.formats.MOST_BYTES", 1 << 20)
    content = LINES + b" " * (2 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert predict(source=str(tmp_path / name)) == 2
    assert f"{name}:{len(RECORDS) + 1}: a line of more than 1 MiB" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_are_redacted_as_the_options_say(predict, tmp_path):
    lines = b"".join(line(delta=name, text="Ada met bob@x.org A-17") for name in ("names", "mood"))
    (tmp_path / "redaction.json").write_text('{"patterns": {"ORDER": "A-[0-9]+"}}')
    asked = ("--redact", "keep", "--patterns", "EMAIL=hash,ORDER", "--output", str(tmp_path / "out.jsonl"))
    assert predict(*asked, "--redaction-file", str(tmp_path / "redaction.json"), lines=lines) == 0
    names, mood = (json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines())
    assert names["redacted"] == f"Ada met [EMAIL:{sha256(b'bob@x.org').hexdigest()[:12]}] [ORDER]"
    assert "redacted" not in mood
    every = ("--redact", "PER=hash,*=keep", "--patterns", "all", "--output", str(tmp_path / "all.jsonl"))
    assert predict(*every, lines=lines) == 0
    assert "bob@x.org" not in json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])["redacted"]


@pytest.fixture
def corpus(predict, tmp_path):
    """Runs over two files and a pattern, in small windows; nothing is timed first: a note says how the weights lay."""
    (tmp_path / "a.jsonl").write_bytes(LINES * 20 + b"\n")
    (tmp_path / "b-1.jsonl.gz").write_bytes(gzip.compress(LINES * 9))
    (tmp_path / "b-2.jsonl").write_bytes(LINES * 11)

    def run(output: str, *options: str) -> list[str]:
        note = tmp_path / f".{output}.partial.json"
        if not note.exists():
            note.write_text('{"prepack": false}')
            note.with_suffix("").touch()
        arguments = ["--input", str(tmp_path / "b-*"), "--output", str(tmp_path / output), "--max-tokens", "64"]
        return [*arguments, *options]

    return run


def test_several_executors_give_the_bytes_of_one_process(predict, corpus, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for output, count in (("one", "1"), ("two", "2")):
            assert predict(*corpus(output, "--executors", count), source=str(tmp_path / "a.jsonl")) == 0
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "one").read_bytes().count(b"\n") == 40 * len(RECORDS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


KILLED = """
import os, signal, sys
from bertology_serve.cli.main import main
from bertology_serve.serving import offline
offline.KEEP_SECONDS, write, left = 0.0, offline.AnswerFile.write, [5]

def last_words(file, lines, answers):
    write(file, lines, answers)
    left[0] -= 1
    if not left[0]:
        offline.KEEP_SECONDS = 1e9
    if left[0] == -3:
        file._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

offline.AnswerFile.write = last_words
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_was_killed_goes_on(predict, corpus, encoder, deltas, tmp_path, capsys):  # noqa: F811
    source = str(tmp_path / "a.jsonl")
    assert predict(*corpus("whole"), source=source) == 0
    options = ["--backbone", encoder.name, "--deltas", str(deltas), "--input", source, *corpus("out")]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # of which last bits depend
    ended = subprocess.run([sys.executable, "-c", KILLED, "predict", *options], env=env, check=False, timeout=300)
    assert ended.returncode == -9
    assert not (tmp_path / "out").exists()
    noted = json.loads((tmp_path / ".out.partial.json").read_bytes())
    partial = (tmp_path / ".out.partial").read_bytes()
    assert 0 < noted["bytes"] < len(partial)
    assert partial[: noted["bytes"]].count(b"\n") == noted["lines"]
    for end in ("partial", "partial.json"):
        shutil.copy(tmp_path / f".out.{end}", tmp_path / f".other.{end}")

    assert predict(*corpus("out"), source=source) == 0
    assert f"going on after {noted['lines']} answers" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob(".out.*"))

    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"cat", b"dog") * 20 + b"\n")  # not what was answered
    assert predict(*corpus("other"), source=source) == 0
    assert "going on" not in capsys.readouterr().err
    assert predict(*corpus("anew"), source=source) == 0
    assert (tmp_path / "other").read_bytes() == (tmp_path / "anew").read_bytes()


def test_a_bad_line_of_many_files_is_named_and_costs_only_what_comes_after_it(
    predict, corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("bertology_serve.serving.offline.KEEP_SECONDS", 0.0)
    source, good = str(tmp_path / "a.jsonl"), (tmp_path / "b-2.jsonl").read_bytes()
    (tmp_path / "b-2.jsonl").write_bytes(good + b"{\n")
    assert predict(*corpus("out"), source=source) == 2
    number = 11 * len(RECORDS) + 1
    assert f"error: {tmp_path}/b-2.jsonl:{number}: the line is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "b-2.jsonl").write_bytes(good)
    assert predict(*corpus("out"), source=source) == 0
    assert "going on after" in capsys.readouterr().err
    monkeypatch.undo()
    assert predict(*corpus("whole"), source=source) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("other", ["options", "lines"])
def test_what_another_run_left_is_not_gone_on_with_after_a_third(other, predict, corpus, tmp_path, capsys, monkeypatch):
    """The second run ends before its first note; that of the first must not stand for its answers."""
    source, good = str(tmp_path / "a.jsonl"), (tmp_path / "b-2.jsonl").read_bytes()
    first = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b-2.jsonl").write_bytes(good + b"{\n")
    monkeypatch.setattr("bertology_serve.serving.offline.KEEP_SECONDS", 0.0)
    assert predict(*corpus("out"), source=source) == 2
    monkeypatch.setattr("bertology_serve.serving.offline.KEEP_SECONDS", 1e9)
    if other == "lines":
        (tmp_path / "a.jsonl").write_bytes(first.replace(b"cat", b"dog"))
    assert predict(*corpus("out"), *(["--logits"] if other == "options" else []), source=source) == 2
    (tmp_path / "a.jsonl").write_bytes(first)
    (tmp_path / "b-2.jsonl").write_bytes(good)
    capsys.readouterr()
    assert predict(*corpus("out"), source=source) == 0
    assert "going on" not in capsys.readouterr().err
    assert predict(*corpus("whole"), source=source) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_two_runs_do_not_write_one_file(predict, tmp_path, capsys):
    with (tmp_path / ".out.jsonl.partial").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert predict(lines=LINES) == 2
    assert "another run writes" in capsys.readouterr().err
