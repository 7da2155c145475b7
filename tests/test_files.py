"""What is replaced is the old or the new at every moment, whatever fails and whenever the process dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from bertology_serve import files
from bertology_serve.errors import SpecError
from bertology_serve.files import check_outputs, replace_directory, replacing, write_json


def made(path: Path, text: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "a").write_text(text)
    return path


def read(path: Path) -> str:
    return (path / "inner" / "a").read_text()


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, on whatever file system the tests run."""
    if request.param == "renames":
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    return str(request.param)


def test_a_directory_takes_the_place_of_another_which_is_there_to_be_removed(tmp_path, way):
    replace_directory(made(tmp_path / ".stage", "1"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    stage = made(tmp_path / ".stage", "2")
    replace_directory(stage, tmp_path / "out")
    assert (read(tmp_path / "out"), read(stage)) == ("2", "1")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".stage"}


def test_an_empty_directory_and_a_link_to_one(tmp_path, way):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    replace_directory(made(tmp_path / ".stage", "1"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "place") == "1"


def test_where_the_second_rename_fails_the_old_one_is_back(tmp_path, monkeypatch):
    target, stage = made(tmp_path / "out", "old"), made(tmp_path / ".stage", "new")
    rename = os.rename

    def fails(one: Any, other: Any) -> None:
        if Path(one) == stage:
            raise OSError(28, "No space left on device")
        rename(one, other)

    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        replace_directory(stage, target)
    assert (read(target), read(stage)) == ("old", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".stage"}


DIES = """
import os, sys
from pathlib import Path
from bertology_serve import files
files._exchanged = lambda one, other: False
rename, left = os.rename, int(sys.argv[2])
def dies(one, other):
    global left
    if not left:
        os._exit(9)
    left -= 1
    rename(one, other)
os.rename = dies
root = Path(sys.argv[1])
files.replace_directory(root / ".stage", root / "out")
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path, monkeypatch, renames):
    target, stage = made(tmp_path / "out", "old"), made(tmp_path / ".stage", "new")
    assert subprocess.run([sys.executable, "-c", DIES, str(tmp_path), str(renames)], timeout=60).returncode == 9
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    found = target if target.exists() else tmp_path / ".out.old"
    assert read(found) == ("new" if renames == 2 else "old")
    fresh = made(tmp_path / ".fresh", "newer")
    replace_directory(fresh, target)
    assert (read(target), read(fresh)) == ("newer", "new" if renames == 2 else "old")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", ".stage", ".fresh"}
    assert renames == 2 or read(stage) == "new"


def test_who_reads_meanwhile_always_finds_one(tmp_path):
    target, stage = made(tmp_path / "out", "even"), made(tmp_path / ".stage", "odd")
    if not files._exchanged(stage, target):
        pytest.skip("this file system does not exchange names")
    seen: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                seen.append(read(target))
            except OSError as problem:
                seen.append(str(problem))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        replace_directory(stage, target)
    stop.set()
    reader.join(120)
    assert set(seen) <= {"even", "odd"}


def test_an_exchange_that_fails_changes_nothing(tmp_path):
    stage = made(tmp_path / ".stage", "new")
    with pytest.raises(FileNotFoundError):
        files._exchanged(stage, tmp_path / "nowhere")
    assert read(stage) == "new"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    for text in ("1", "2"):
        with replacing(path) as own:
            assert own.parent == tmp_path
            own.write_text(text)
            assert not path.exists() or path.read_text() == "1"
        assert path.read_text() == text
    with pytest.raises(ValueError, match="stop"), replacing(path) as own:  # noqa: PT012 - what is raised in between
        own.write_text("half")
        raise ValueError("stop")
    assert path.read_text() == "2"
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_json_is_for_people_and_keeps_names_that_utf8_lacks(tmp_path):
    values = {"name": "Zoë", "path": os.fsdecode(b"a\xff")}
    write_json(tmp_path / "a.json", values)
    assert '"Zoë"' in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == values
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"name": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == values


def test_what_is_read_is_not_written_over(tmp_path):
    (tmp_path / "in").touch()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    check_outputs([tmp_path / "out", None, "-", "/dev/null", "/dev/null"], [str(tmp_path / "in"), "-", "hub:x", None])
    with pytest.raises(SpecError, match="link is what is read; give another file"):
        check_outputs([tmp_path / "link"], [tmp_path / "in"])
    with pytest.raises(SpecError, match="same is written already"):
        check_outputs([tmp_path / "same", tmp_path / "a" / ".." / "same"], [])
