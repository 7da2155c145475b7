from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys

import pytest

from bertology_serve.errors import DataError, NotFound
from bertology_serve.serving.offline import reading, writing


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_reads_files_zipped_or_not(tmp_path, name):
    path, data = tmp_path / name, b"one\ntwo\n"
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with reading(str(path)) as lines:
        assert list(lines) == [b"one\n", b"two\n"]


def test_reads_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\n")))
    with reading("-") as lines:
        assert list(lines) == [b"x\n"]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(NotFound, match=r"no file .*; expected JSON lines"), reading(str(tmp_path / "none")):
        pass
    with pytest.raises(DataError, match="Is a directory"), reading(str(tmp_path)):
        pass
    broken = tmp_path / "b.gz"
    broken.write_bytes(gzip.compress(os.urandom(10_000))[:500])
    with pytest.raises(DataError, match="broken gzip file"), reading(str(broken)) as lines:
        list(lines)


def test_an_error_of_the_reader_is_not_the_files_fault(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileNotFoundError), reading(str(tmp_path / "a")):
        (tmp_path / "other").read_bytes()


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "out"
    path.write_text("before")
    with writing(str(path)) as file:
        file.write(b"after")
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_or_not_at_all(tmp_path):
    def half() -> None:
        with writing(str(tmp_path / "out")) as file:
            file.write(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with writing(str(tmp_path / "link")) as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"


def test_devices_are_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    with writing(str(tmp_path / "pipe")) as file:
        file.write(b"through")
    assert reader.communicate(timeout=120)[0] == b"through"
    assert (tmp_path / "pipe").is_fifo()


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="is a directory"), writing(str(tmp_path)):
        pass
    with pytest.raises(DataError, match="No such file or directory"), writing(str(tmp_path / "no" / "file")):
        pass


def test_a_reader_of_standard_output_may_leave_early():
    code = (
        "from bertology_serve.serving.offline import writing\n"
        "with writing('-') as out:\n"
        "    for _ in range(10**5): out.write(b'x' * 100 + b'\\n')\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    error = run.stderr.read()
    run.stderr.close()
    assert (run.wait(20), error) == (0, b"")
