"""The protocol, on builders that need no tool: in this process and in one of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bertology_serve.bench.cpu import worker_process
from bertology_serve.bench.cpu.worker import Worker, read
from bertology_serve.bench.cpu.worker_process import WorkerProcess
from bertology_serve.errors import Unsupported

BUILDERS = """
import os, time
import numpy as np

def make_file(target):
    open(target, "w").write("made")

def sums(times):
    print("noise on stdout")
    return lambda batch: lambda: batch["input_ids"].sum(1, keepdims=True) * times

def fails():
    raise ValueError("no luck\\nand more")

def dies():
    os._exit(7)

def hangs():
    time.sleep(60)
"""


@pytest.fixture
def workload(tmp_path):
    """Two batches of two and one rows."""
    np.savez(tmp_path / "w.npz", **{"0.input_ids": np.array([[1, 2], [3, 4]]), "1.input_ids": np.array([[5]])})
    (tmp_path / "w.json").write_text(json.dumps({"texts": [["a", "b"], ["c"]], "owners": [["x", "y"], ["x"]]}))
    return str(tmp_path / "w")


@pytest.fixture
def process(tmp_path, monkeypatch):
    (tmp_path / "builders.py").write_text(BUILDERS)
    (tmp_path / "worker.py").write_text((worker_process.HERE / "worker.py").read_text())
    monkeypatch.setattr(worker_process, "HERE", tmp_path)
    with WorkerProcess(sys.executable, "builders", 1) as found:
        yield found


def test_batches_are_read_with_their_texts(workload):
    first, second = read(workload)
    assert (first["texts"], first["owners"], first["input_ids"].tolist()) == (["a", "b"], ["x", "y"], [[1, 2], [3, 4]])
    assert (second["texts"], second["input_ids"].tolist()) == (["c"], [[5]])


def test_a_workload_is_bound_once_and_run_as_often_as_asked(workload, tmp_path):
    told: list[str] = []

    def builder():
        def bind(batch):
            told.append("bind")
            return lambda: told.append("run") or batch["input_ids"][:, :1]

        return bind

    worker = Worker({"builder": builder})
    assert worker.open("builder", {})["rss"] > 1e6
    for _ in range(2):
        assert worker.time(workload, 3).keys() == {"cpu", "wall", "rss"}
    assert told == ["bind"] * 2 + ["run"] * 12
    assert worker.answer(workload, str(tmp_path / "rows.npy")) == {"rows": 3}
    assert np.load(tmp_path / "rows.npy").tolist() == [[1.0], [3.0], [5.0]]


def test_a_process_answers_what_it_is_asked(process, workload, tmp_path):
    assert process.ask("make", maker="make_file", options={"target": str(tmp_path / "made")})["seconds"] >= 0
    assert (tmp_path / "made").read_text() == "made"
    told = process.ask("open", builder="sums", options={"times": 10})
    assert told["versions"]["numpy"] == np.__version__
    assert process.ask("answer", workload=workload, to=str(tmp_path / "rows.npy")) == {"rows": 3}
    assert np.load(tmp_path / "rows.npy").tolist() == [[30.0], [70.0], [50.0]]
    assert process.ask("time", workload=workload, repeats=2)["cpu"] >= 0


def test_what_fails_is_said_in_one_line_and_the_process_goes_on(process, workload):
    with pytest.raises(Unsupported, match=r"^open: ValueError: no luck and more$"):
        process.ask("open", builder="fails", options={})
    with pytest.raises(Unsupported, match=r"^time: RuntimeError: no contender was opened$"):
        process.ask("time", workload=workload, repeats=1)
    assert process.ask("open", builder="sums", options={"times": 1})["seconds"] >= 0


def test_a_process_that_dies_is_named(process):
    with pytest.raises(Unsupported, match=r"^it died at open: .*\(exit code 7\)$"):
        process.ask("open", builder="dies", options={})


def test_a_process_that_hangs_is_ended(process, monkeypatch):
    process.ask("open", builder="sums", options={"times": 1})
    monkeypatch.setattr(worker_process, "SECONDS", 0.5)
    with pytest.raises(Unsupported, match=r"^it took more than 0.5 s to open$"):
        process.ask("open", builder="hangs", options={})


def test_the_files_of_workers_import_nothing_of_this_package():
    for name in ("worker", "other_tools"):
        text = Path(worker_process.__file__).with_name(f"{name}.py").read_text()
        assert "bertology_serve" not in text, name
