from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from bertology_serve.encoder.delta_set import RowCache
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import Crashed, FormatError, NotFound, Unsupported
from bertology_serve.serving.execution import executor_handle, fork_server
from bertology_serve.serving.execution.channel import Lost, Op
from bertology_serve.serving.execution.engine_choice import EngineConfig
from bertology_serve.serving.execution.executor_handle import Supervisor, WorkerOptions, WorkerPlace
from bertology_serve.serving.execution.fork_server import Worker
from bertology_serve.serving.execution.remote import Remote
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.conftest import RECORDS, save_version
from tests.serving.running import wait


def answers(pipeline, requests) -> list[dict]:
    jobs = [pipeline.prepare(request) for request in requests]
    return [
        {**prediction.as_dict(), "cost": job.cost} for prediction, job in zip(pipeline.run(jobs), jobs, strict=True)
    ]


def kill(remote: Remote) -> None:
    wait(lambda: remote.is_up)
    os.kill(remote.supervisors[0].pid, signal.SIGKILL)


def replace(remote: Remote) -> None:
    """Kills the executor and waits for the next one."""
    restarts = remote.restarts
    kill(remote)
    wait(lambda: remote.restarts == restarts + 1)
    assert remote.is_up


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_the_fork_server_has_one_thread(remote):
    assert threads_of(remote.supervisors[0]._nursery._process.pid) == 1


def test_mixed_batches_are_those_of_this_process_bit_for_bit(far, pipeline):
    requests = [Request(name, record, logits=True) for name, record in RECORDS.items()] * 2
    requests.append(Request("sense", RECORDS["sense"] | {"pooling": "chunks", "chunk_tokens": 2}))
    draw = random.Random(0)
    for one in (far.pipeline, pipeline):  # rows of labels that other tests left come from other batches
        one.loaded("labels").rows = RowCache()
    for _ in range(5):
        draw.shuffle(requests)
        assert answers(far.pipeline, requests) == answers(pipeline, requests)
    assert far.pipeline.run([]) == []


def test_rows_of_tokens_come_from_there_beside_the_delta_s_own_answer(far, pipeline):
    record = {"text": "the cat , the dog"}
    requests = [Request(name, record, rows=rows) for name in ("sense", "base", "raw") for rows in (True, False)]
    found = answers(far.pipeline, requests)
    assert found == answers(pipeline, requests)
    assert [len(one.get("vectors", ())) for one in found] == [7, 0] * 3


def test_what_is_known_of_a_delta_is_known_here_too(far, registry):
    for name in RECORDS.keys() - {"base"}:
        near, card = registry.find(name), far.find(name)
        assert (card.task, card.specs, card.version, card.base) == (near.task, near.specs, near.version, near.base)
        assert card.kinds == near.kinds
        assert card.bytes == near.bytes
        assert not card.tensors


def test_the_onnx_engine_over_there(far, pipeline, remote):
    requests = [Request(name, record, logits=True) for name, record in RECORDS.items()]
    before = answers(remote, requests)
    try:
        name, found = remote.settle(EngineConfig("onnx", prepack=False))
        assert name.startswith("onnxruntime")
        assert found.found
        replace(remote)
        engine = answers(remote, requests)
        assert engine != before  # other kernels, and the new executor has them too
    finally:
        assert remote.settle(EngineConfig("torch", prepack=False))[0] == "torch"
    replace(remote)
    assert answers(remote, requests) == before == answers(pipeline, requests)


def test_killed_while_idle(far, pipeline, remote):
    pid = remote.supervisors[0].pid
    replace(remote)
    assert remote.supervisors[0].pid != pid
    requests = [Request(name, record) for name, record in RECORDS.items()]
    assert answers(remote, requests) == answers(pipeline, requests)


def test_killed_during_a_batch(far, remote, monkeypatch):
    """A stopped process stands for one in the middle of a batch."""
    job, batches = remote.prepare(Request("mood", RECORDS["mood"])), remote.supervisors[0].line().batches
    os.kill(remote.supervisors[0].pid, signal.SIGSTOP)
    timer, ask = threading.Timer(0.2, kill, (remote,)), batches.ask
    monkeypatch.setattr(batches, "ask", lambda *call: (timer.start(), ask(*call))[1])  # not before it is asked
    with pytest.raises(Crashed, match="ended while it ran a batch"):
        remote.run([job])
    timer.join()
    assert remote.run([job])[0].answer["label"] in ("bad", "good", "so-so")


def test_one_that_hangs_is_replaced(far, remote):
    job, restarts = remote.prepare(Request("mood", RECORDS["mood"])), remote.restarts
    remote.patience(0.3)
    try:
        os.kill(remote.supervisors[0].pid, signal.SIGSTOP)
        with pytest.raises(Crashed, match="timed out"):
            remote.run([job])
        wait(lambda: remote.restarts == restarts + 1)
    finally:
        remote.patience(60)
    remote.run([job])


def test_versions_come_and_go(encoder, remote, tmp_path):
    save_version(encoder, tmp_path, "it", "1", 1)
    save_version(encoder, tmp_path, "it", "2", 2, like="names")
    save_version(encoder, tmp_path, "other", "1", 3, like="chooser")
    registry, near = Registry(remote, tmp_path), Registry(Pipeline(encoder), tmp_path)
    request = Request("it", {"tokens": ["Ada", "went"], "text": "Ada went"})
    for version in ("1", "2", "1"):
        registry.put("it", version)
        near.put("it", version)
        assert answers(remote, [request]) == answers(near.pipeline, [request])
    job = remote.prepare(request)
    registry.rollback("it")
    assert registry.find("it").version == "2"
    registry.remove("it")
    with pytest.raises(NotFound):
        remote.prepare(request)
    replace(remote)
    assert remote.run([job])[0].version == "1", "a call under way finishes on the version that it began with"


def test_nothing_is_held_of_what_has_gone(encoder, remote, tmp_path):
    save_version(encoder, tmp_path, "brief", "1", 3, like="chooser")
    registry, before = Registry(remote, tmp_path), set(remote._held)
    registry.put("brief")
    key = (remote._held.keys() - before).pop()
    assert remote._ready["brief"].entry.prompt_length == 2
    registry.remove("brief")
    assert key not in remote._held
    with pytest.raises(NotFound, match="did not come back"):
        remote.supervisors[0].line().batches.ask(Op.RUN, {"keys": [(key, False)], "sizes": (0, 0)})


def test_a_delta_whose_files_have_gone_does_not_come_back(encoder, remote, far, tmp_path, caplog):
    save_version(encoder, tmp_path, "fleeting", "1", 1)
    registry = Registry(remote, tmp_path)
    registry.put("fleeting")
    job = remote.prepare(Request("fleeting", RECORDS["mood"]))
    shutil.rmtree(tmp_path / "fleeting")
    replace(remote)
    assert "delta fleeting did not come back" in caplog.text
    with pytest.raises(NotFound, match="'fleeting' did not come back after a restart; load it again"):
        remote.run([job])
    assert answers(remote, [Request("mood", RECORDS["mood"])])
    assert registry.tiers.is_cold("fleeting")
    with pytest.raises(NotFound, match="no directory"):
        registry.tiers.raise_up("fleeting")
    save_version(encoder, tmp_path, "fleeting", "1", 1)
    assert registry.put("fleeting").version == "1"
    assert answers(remote, [Request("fleeting", RECORDS["mood"])])
    registry.remove("fleeting")


@pytest.mark.parametrize("problem", [RuntimeError("nobody foresaw this"), KeyError("prompt"), NotFound("gone")])
def test_a_delta_that_is_not_admitted_is_not_held(encoder, remote, far, tmp_path, monkeypatch, problem):
    save_version(encoder, tmp_path, "brief", "1", 3)
    registry, load, before = Registry(remote, tmp_path), remote._load, set(remote._held)
    keys: list[str] = []

    def admitted_and_lost(one: Supervisor, op: Op, body: dict) -> dict:
        answer = load(one, op, body)
        if op is Op.ADMIT:
            keys.append(body["key"])
            raise problem
        return answer

    monkeypatch.setattr(remote, "_load", admitted_and_lost)
    with pytest.raises(type(problem)):
        registry.put("brief")
    monkeypatch.undo()
    assert set(remote._held) == before
    remote.run([remote.prepare(Request("mood", RECORDS["mood"]))])
    with pytest.raises(NotFound, match="did not come back"):  # nor over there
        remote.supervisors[0].line().batches.ask(Op.RUN, {"keys": [(key, False) for key in keys], "sizes": (0, 0)})


def test_a_delta_that_was_read_and_not_understood_is_unreferenced(encoder, remote, tmp_path, monkeypatch):
    save_version(encoder, tmp_path, "brief", "1", 3)
    monkeypatch.setattr("bertology_serve.serving.execution.remote.from_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remote.read(tmp_path / "brief" / "1", "brief")
    assert len(remote.supervisors[0].unreferenced) == 1


def test_a_fork_server_that_hangs_is_not_waited_for(monkeypatch):
    """It neither loads nor forks, as one that was stopped."""
    monkeypatch.setattr(executor_handle, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(executor_handle, "OUTLINE_SECONDS", 0.1)
    monkeypatch.setattr(executor_handle, "FORK_SECONDS", 0.1)
    with executor_handle.ForkServer(WorkerOptions("nothing")) as nursery:
        with pytest.raises(Lost, match="timed out"):
            nursery.outline()
        first = nursery._process
        with pytest.raises(Lost, match="timed out"):
            nursery.fork(WorkerPlace("cpu", 1))
        assert first.returncode is not None, "it was ended"
        assert nursery._process is not first, "another one was tried"


def test_an_executor_one_of_whose_threads_fails_ends(monkeypatch):
    """The server would wait for an answer on that channel."""
    codes: list[int] = []
    ended = threading.Event()

    def exit_with(code: int) -> None:
        codes.append(code)
        if len(codes) == 2:
            ended.set()

    def fail(self: Worker, channel: object) -> None:
        if channel == "loads":
            raise ValueError("nobody foresaw this")
        assert wait(lambda: codes) is None

    monkeypatch.setattr(fork_server.os, "_exit", exit_with)
    monkeypatch.setattr(Worker, "serve", fail)
    fork_server.work(None, "batches", ["loads"], None, None)
    assert ended.wait(20)
    assert codes == [1, 0]


def test_what_is_wrong_with_a_delta_is_said_as_ever(encoder, remote, tmp_path):
    save_version(encoder, tmp_path, "torn", "1", 1)
    weights = tmp_path / "torn" / "1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FormatError, match="adapter_model"):
        Registry(remote, tmp_path).put("torn")
    save_version(encoder, tmp_path, "good", "1", 2)
    with pytest.raises(Unsupported, match="in this process"):
        remote.add(encoder.read_delta(tmp_path / "good" / "1"))
