"""Versions come and go under load: over a real socket, with real deltas of several kinds."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.deltas import store
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import FormatError, NotFound, Unsupported
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.lifecycle import Lifecycle
from tests.serving.conftest import save_version
from tests.serving.held import Held
from tests.serving.running import Running, running, wait

ADMIN = "an-admin-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}
TEXT = "the cat was good"


@pytest.fixture
def managed(made) -> Iterator[Running]:
    ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True), Key("user", digest_of("user-" + ADMIN, ""))])
    with running(made.pipeline, ring, made.root) as started:
        started.client.headers.update(HEADERS)
        yield started


def manage(server: Running, what: str, name: str, **parameters: Any) -> httpx.Response:
    body = {"parameters": parameters} if parameters else b""
    return server.post(f"/v2/repository/models/{name}/{what}", body)


def states(server: Running, **body: Any) -> dict[tuple[str, str], str]:
    entries = server.post("/v2/repository/index", body or b"").json()
    return {(entry["name"], entry["version"]): entry["state"] for entry in entries if entry["name"] != "base"}


def test_a_delta_s_life(managed):
    assert states(managed) == dict.fromkeys([("grade", "1"), ("mood", "1"), ("mood", "2")], "UNAVAILABLE")
    assert managed.post("/predict", {"delta": "mood", "text": TEXT}).status_code == 404
    assert manage(managed, "load", "mood").json() == {"name": "mood", "version": "2", "state": "READY", "reason": ""}
    assert managed.post("/predict", {"delta": "mood", "text": TEXT}).json()["version"] == "2"
    assert manage(managed, "load", "mood", version="1").json()["version"] == "1"
    assert managed.post("/predict", {"delta": "mood", "text": TEXT}).json()["version"] == "1"
    assert states(managed) == {("grade", "1"): "UNAVAILABLE", ("mood", "2"): "UNAVAILABLE", ("mood", "1"): "READY"}
    assert states(managed, ready=True) == {("mood", "1"): "READY"}
    assert "bertology_deltas 2.0" in managed.client.get("/metrics").text
    assert manage(managed, "unload", "mood").status_code == 200
    assert managed.client.get("/v2/models/mood/ready").status_code == 404
    reasons = {(e["name"], e["version"]): e["reason"] for e in managed.post("/v2/repository/index", b"").json()}
    assert reasons["mood", "1"] == "unloaded"
    assert "bertology_deltas 1.0" in managed.client.get("/metrics").text


def test_a_version_in_the_configuration_as_nvidia_s_client_sends_it(managed):
    assert manage(managed, "load", "mood", config='{"version": "1"}').json()["version"] == "1"


def test_management_needs_an_admin(managed, made):
    for path in ("index", "models/mood/load", "models/mood/unload"):
        user = {"Authorization": f"Bearer user-{ADMIN}"}
        assert managed.client.post(f"/v2/repository/{path}", headers=user).status_code == 403
    with running(made.pipeline, root=made.root) as without_keys:
        assert manage(without_keys, "load", "mood").status_code == 403


@pytest.mark.parametrize(
    ("what", "name", "body", "status", "message"),
    [
        ("load", "moot", b"", 404, "no delta 'moot' in"),
        ("load", "mood", {"parameters": {"version": "7"}}, 404, "no version '7'; known: 1, 2"),
        ("load", "mood", {"parameters": {"version": "../../grade/1"}}, 404, "no version"),
        ("load", "mood", {"parameters": {"version": 1}}, 400, "expected a text"),
        ("load", "..%2fmood", b"", 404, "no such path"),
        ("load", "..", b"", 404, ""),
        ("load", "Mood", b"", 400, "cannot be used"),
        ("load", "base", b"", 400, "taken by the encoder itself"),
        ("load", "mood", {"parameters": {"file:1/delta.json": "e30="}}, 400, "files are not taken"),
        ("load", "mood", {"parameters": {"url": "http://x"}}, 400, "unknown parameter 'url'"),
        ("load", "mood", {"parameters": {"config": 3}}, 400, "expected a JSON text"),
        ("load", "mood", {"parameters": {"config": "["}}, 400, "not JSON"),
        ("load", "mood", {"parameters": []}, 400, "expected an object"),
        ("load", "mood", b"[]", 400, "expected an object or nothing"),
        ("unload", "mood", b"", 404, "no delta 'mood'"),
        ("unload", "mood", b"{", 400, "not JSON"),
        ("unload", "base", b"", 400, "cannot be removed"),
    ],
)
def test_bad_changes_are_told_what_is_wrong(managed, what, name, body, status, message):
    response = managed.post(f"/v2/repository/models/{name}/{what}", body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]
    assert states(managed, ready=True) == {}


@pytest.mark.parametrize("body", [{"ready": 1}, b"3"])
def test_bad_bodies_of_the_index(managed, body):
    assert managed.post("/v2/repository/index", body).status_code == 400


def test_a_version_that_cannot_be_loaded_changes_nothing(managed, root):
    manage(managed, "load", "mood", version="1")
    (root / "mood" / "2" / "adapter_model.safetensors").write_bytes(b"torn")
    response = manage(managed, "load", "mood", version="2")
    assert response.status_code == 400
    assert managed.post("/predict", {"delta": "mood", "text": TEXT}).json()["version"] == "1"


def alone(encoder: Encoder, root: Path, version: str) -> dict[str, Any]:
    pipeline = Pipeline(encoder)
    pipeline.add(store.load(root / "mood" / version, encoder.anatomy))
    return dict(pipeline.run([pipeline.prepare(Request("mood", {"text": TEXT}))])[0].answer)


@pytest.fixture
def swapping(encoder, tmp_path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Five versions of one delta, of three kinds and two tasks, and the answer of each alone."""
    for version, like in enumerate(("mood", "grade", "mood", "grade", "mood"), 1):
        save_version(encoder, tmp_path, "mood", str(version), version, like)
    save_version(encoder, tmp_path, "grade", "1", 9, "grade")
    return tmp_path, {str(version): alone(encoder, tmp_path, str(version)) for version in range(1, 6)}


def check(answer: dict[str, Any], expected: dict[str, dict[str, Any]]) -> str:
    """The version that an answer names, after comparing it with that version's own answer."""
    own = expected[answer["version"]]
    if "value" in own:
        assert answer["value"] == pytest.approx(own["value"], abs=1e-5)
    else:
        assert answer["label"] == own["label"]
        assert answer["scores"] == pytest.approx(own["scores"], abs=1e-5)
    return str(answer["version"])


def test_200_swaps_under_load_fail_nothing_and_every_answer_is_its_version_s(encoder, swapping):
    root, expected = swapping
    made = Registry(Pipeline(encoder), root)
    for name in ("mood", "grade"):
        made.put(name)
    ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)])
    infer = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}], "outputs": []}
    seen: list[str] = []
    failures: list[Any] = []
    with running(made.pipeline, ring, root) as server:
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.url, headers=HEADERS, timeout=120) as client:
                while not stop.is_set():
                    items = [{"delta": "mood", "text": TEXT}, {"delta": "grade", "text": TEXT}]
                    response = client.post("/predict", json=items)
                    task = client.post("/models/mood", json={"inputs": TEXT})
                    tensors = client.post("/v2/models/mood/infer", json=infer)
                    try:
                        seen.append(check(response.json()[0], expected))
                        assert task.status_code == 200
                        outputs = {output["name"]: output["data"] for output in tensors.json()["outputs"]}
                        version = tensors.json()["model_version"]
                        seen.append(version)
                        key, value = ("value", [expected[version].get("value")])
                        if "label" in outputs:
                            key, value = "scores", list(expected[version]["scores"].values())
                        assert outputs[key] == pytest.approx(value, abs=1e-5)
                    except Exception as problem:
                        failures.append((problem, response.text, task.text, tensors.text))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.url, headers=HEADERS, timeout=120) as client:
            for swap in range(200):
                body = {"parameters": {"version": str(1 + swap % 5)}}
                assert client.post("/v2/repository/models/mood/load", json=body).status_code == 200
        stop.set()
        for thread in threads:
            thread.join(120)
    assert failures == []
    assert set(seen) == set(expected)


def test_calls_under_way_finish_on_the_version_that_they_began_with(made, encoder, root):
    expected = {version: alone(encoder, root, version) for version in ("1", "2")}
    made.put("mood", "1")
    held = Held(made.pipeline)
    answers: dict[str, Any] = {}
    with running(held, root=root) as server:

        def ask(when: str) -> None:
            answers[when] = server.post("/predict", {"delta": "mood", "text": TEXT}).json()

        calls = [threading.Thread(target=ask, args=(when,)) for when in ("running", "queued", "after")]
        calls[0].start()
        assert held.busy.wait(20)
        calls[1].start()
        wait(lambda: server.server.service.queue.items == 1)
        made.put("mood", "2")
        calls[2].start()
        wait(lambda: server.server.service.queue.items == 2)
        made.remove("mood")
        held.go.set()
        for call in calls:
            call.join(120)
    assert [answers[when]["version"] for when in ("running", "queued", "after")] == ["1", "1", "2"]
    assert check(answers["queued"], expected) == "1"
    assert "entities" in answers["after"]


def test_unloading_frees_the_rows_and_loading_again_takes_no_more(made, encoder):
    bank = made.pipeline.bank

    def cycle() -> int:
        for name, version in (("mood", "1"), ("mood", "2"), ("grade", "1")):
            made.put(name, version)
        for name in ("mood", "grade"):
            made.remove(name)
        return bank.bytes

    first = cycle()
    assert [cycle() for _ in range(20)] == [first] * 20
    assert bank.entries == {}
    for pool in bank.pools.values():
        assert sum(hi - lo for lo, hi in pool.free) == pool.capacity - 1
        assert not any(column.any() for column in pool.columns.values())


def test_rows_of_jobs_under_way_are_freed_after_them(made):
    made.put("mood", "1")
    pipeline = made.pipeline
    job = pipeline.prepare(Request("mood", {"text": TEXT}))
    made.remove("mood")
    assert len(pipeline.bank.entries) == 1
    assert pipeline.run([job])[0].version == "1"
    del job
    pipeline.run([pipeline.prepare(Request("base", {"text": TEXT}))])
    assert pipeline.bank.entries == {}


MOOD = {"delta": "mood", "text": TEXT}


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (MOOD, 200),
        ([MOOD, MOOD, {**MOOD, "text": "another text"}], 200),
        ({"deltas": ["mood", "base"], "text": TEXT}, 200),
        ([MOOD, {**MOOD, "text": "long " * 40}], 413),
        ([MOOD, MOOD], 500),
    ],
    ids=["one", "some", "several deltas", "one that is too long", "a batch that fails"],
)
def test_rows_of_calls_that_were_answered_wait_for_no_other_batch(call, status, made, monkeypatch):
    """Neither for the next one, nor for a garbage collection."""
    made.put("mood", "1")
    ledger = made.pipeline.ledger
    if status == 500:
        monkeypatch.setattr(type(made.pipeline), "run", lambda self, jobs: 1 / 0)
    with running(made.pipeline, root=made.root, max_item_tokens=30) as server:
        gc.disable()
        try:
            for _ in range(3):
                assert server.post("/predict", call).status_code == status
            made.remove("mood")
            wait(lambda: not list(ledger))
        finally:
            gc.enable()


def test_a_request_for_a_version_is_never_answered_by_another(made):
    made.put("mood", "1")
    request = Request("mood", {"text": TEXT}, version="1")
    assert made.pipeline.prepare(request).ready.delta.version == "1"
    made.put("mood", "2")
    with pytest.raises(NotFound, match="has no version '1' here; it answers with '2'"):
        made.pipeline.prepare(request)


INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}]}


def swap_once(made: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 comes when the next call has been read for version 1, but is not yet queued."""
    made.put("mood", "1")
    tokenise = made.pipeline.tokenise

    def swap_first(job: Any) -> None:
        monkeypatch.setattr(made.pipeline, "tokenise", tokenise)
        made.put("mood", "2")
        tokenise(job)

    monkeypatch.setattr(made.pipeline, "tokenise", swap_first)


def test_a_call_is_answered_by_the_version_that_it_began_with(made, monkeypatch):
    """Though one of another task comes meanwhile: its answer has the shape that it was read for."""
    with running(made.pipeline, root=made.root) as server:
        swap_once(made, monkeypatch)
        tensors = server.post("/v2/models/mood/infer", INFER).json()
        assert (tensors["model_version"], tensors["outputs"][0]["name"]) == ("1", "label")
        swap_once(made, monkeypatch)
        (answer,) = server.post("/models/mood", {"inputs": TEXT}).json()
        assert {one["label"] for one in answer} == {"bad", "good", "so-so"} if isinstance(answer, list) else answer
        swap_once(made, monkeypatch)
        assert server.post("/v2/models/mood/versions/1/infer", INFER).json()["model_version"] == "1"
        gone = server.post("/v2/models/mood/versions/1/infer", INFER)
        assert gone.status_code == 404
        assert "has no version '1' here; it answers with '2'" in gone.json()["error"]


def test_loads_do_not_run_on_the_threads_that_answer(made, monkeypatch):
    names: list[str] = []
    read = made._read
    monkeypatch.setattr(made, "_read", lambda *args: names.append(threading.current_thread().name) or read(*args))

    async def go() -> None:
        life = Lifecycle(made, Metrics())
        await asyncio.gather(*(life.load("mood") for _ in range(5)), life.load("grade"))
        life.close()

    asyncio.run(go())
    assert len(names) == 2, "five loads of one version at a time read it once"
    assert all(name.startswith("loader") for name in names)


def test_nothing_is_remembered_of_names_that_are_not_there(made):
    async def go() -> Lifecycle:
        life = Lifecycle(made, Metrics())
        for number in range(100):
            for change in (life.load, life.unload, life.rollback):
                with pytest.raises(NotFound):
                    await change(f"x{number}")
        await life.load("mood")
        await life.unload("mood")
        life.close()
        return life

    life = asyncio.run(go())
    assert [len(known) for known in (life._locks, life._doing)] == [0, 0]
    assert life._reasons == {"mood": "unloaded"}


def test_reasons_go_with_what_they_are_of(made, root):
    async def go() -> Lifecycle:
        life = Lifecycle(made, Metrics())
        await life.load("mood")
        await life.unload("mood")
        shutil.rmtree(root / "mood")
        await life.index()
        life.close()
        return life

    assert asyncio.run(go())._reasons == {}


def test_a_slow_load_delays_nobody(made, managed, monkeypatch):
    manage(managed, "load", "grade")
    reading, go, read = threading.Event(), threading.Event(), made._read

    def slow(self: Registry, path: Path, name: str) -> Any:
        reading.set()
        assert go.wait(20)
        return read(path, name)

    monkeypatch.setattr(Registry, "_read", slow)
    load = threading.Thread(target=manage, args=(managed, "load", "mood"))
    load.start()
    assert reading.wait(20)
    assert states(managed)["mood", "1"] == "LOADING"
    assert managed.post("/predict", {"delta": "grade", "text": TEXT}).status_code == 200
    go.set()
    load.join(120)
    assert states(managed, ready=True) == {("grade", "1"): "READY", ("mood", "2"): "READY"}


def test_versions_by_name(made, encoder, root, tmp_path):
    from bertology_serve.deltas.catalog import versions

    save_version(encoder, root, "mood", "10", 4)
    assert list(versions(root, "mood")) == ["1", "2", "10"]
    shutil.move(root / "grade" / "1", root / "loose")
    (root / "grade").rmdir()
    assert [one.path for one in versions(root, "grade").values()] == [root / "loose"]
    (root / "broken").mkdir()
    (root / "broken" / "delta.json").write_text("{")
    assert list(versions(root, "mood")) == ["1", "2", "10"]
    (root / "stray").symlink_to("/")
    with pytest.raises(FormatError, match="points outside"):
        versions(root, "stray")
    with pytest.raises(NotFound, match="no delta 'x'"):
        versions(root, "x")
    with pytest.raises(FormatError, match="cannot be used"):
        versions(root, "../x")


def test_a_server_without_a_directory_loads_nothing(encoder):
    made = Registry(Pipeline(encoder))
    assert made.shelf() == {}
    with pytest.raises(NotFound, match="no directory of deltas"):
        made.put("mood")
    with pytest.raises(Unsupported, match="cannot be removed"):
        made.remove("base")
