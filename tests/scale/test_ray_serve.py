"""Ray Serve: two engines of one machine, asked as one server is. One cluster for all of it: it takes 20 s to start."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from bertology_serve.cli.main import main
from bertology_serve.deltas import store
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import SpecError
from bertology_serve.kinds.lora import Lora
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.listening import bind, url_of
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import Desired, Wish, read_desired
from tests import tiny
from tests.scale.test_router import TENSOR, tiny_close
from tests.serving.conftest import DELTAS, RECORDS, save_version
from tests.serving.running import running, wait

ray = pytest.importorskip("ray", reason="Ray Serve needs the extra ray")
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

from ray import serve  # noqa: E402
from ray.serve.config import HTTPOptions  # noqa: E402

from bertology_serve.scale import ray_serve  # noqa: E402
from bertology_serve.scale.ray_serve import ENGINES, RayAnswer, RayCall  # noqa: E402

ADMIN = {"X-API-Key": "an-admin-key-of-the-tests"}
MANY, RANK = 120, 8  # deltas that are asked, and so large that an engine has room for two thirds of them in 1 MiB


@pytest.fixture(scope="module")
def root(encoder, deltas, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ray") / "deltas"
    shutil.copytree(deltas, root)
    for number in range(MANY):
        delta = tiny.delta(encoder, f"d{number}", [Lora(rank=RANK)], DELTAS["mood"][1], number)
        store.save(delta, root / delta.name / "1", encoder.anatomy, encoder.config.to_dict())
    assert 80 <= 2**20 / delta.resident_bytes(encoder.anatomy) <= 85
    return root


@pytest.fixture(scope="module")
def client(encoder, root) -> Iterator[httpx.Client]:
    bound = bind("127.0.0.1", 0)
    url, port = url_of(bound), bound.getsockname()[1]
    bound.close()
    environment = {"BERTOLOGY_ADMIN_KEYS": ADMIN["X-API-Key"], "BERTOLOGY_API_KEYS": "", "BERTOLOGY_CACHE": ""}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
        runtime_env={"env_vars": environment, "working_dir": None},
    )  # fmt: skip
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        arguments = {"backbone": encoder.name, "deltas": str(root), "replicas": "2", "engine": "torch"}
        options = {
            "device_mb": "1",
            "host_mb": "0",
            "state_file": str(root.with_name("wanted.json")),
            "max_call_seconds": "120",
        }
        serve.run(ray_serve.app(arguments | options))
        with httpx.Client(base_url=url, timeout=120, headers=ADMIN) as client:
            yield client
        serve.shutdown()
    finally:
        ray.shutdown()


def call_of(method: str, path: str, body: bytes = b"", **how: Any) -> RayCall:
    headers = [(name.lower().encode(), value.encode()) for name, value in ADMIN.items()]
    head = {"method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    return RayCall(head, body, how.get("delta"), 1.0, how.get("tried", ()))


def ask_each(engines: set[str], call: RayCall) -> dict[str, RayAnswer]:
    """What each of these engines answers."""
    handle = serve.get_deployment_handle(ENGINES, "default")
    found = [handle.ask.remote(call._replace(tried=tuple(engines - {one}))).result() for one in engines]
    assert {one.engine for one in found} == engines
    return {one.engine: one for one in found}


def loads(engines: set[str]) -> float:
    """Deltas that engines have read from disk since they began."""
    found = ask_each(engines, call_of("GET", "/metrics")).values()
    lines = [line for one in found for line in one.body.decode().splitlines()]
    return sum(float(line.split()[1]) for line in lines if line.startswith("bertology_delta_loads_total "))


def test_calls_of_every_shape_are_answered_as_one_server_does(client, encoder, deltas):
    calls: list[tuple[str, str, Any]] = [
        *(("POST", "/predict", {"delta": name, **record}) for name, record in RECORDS.items()),
        ("POST", "/predict", [{"delta": name, **record} for name, record in RECORDS.items()]),
        ("POST", "/predict", {"deltas": ["mood", "topics"], "text": "a good film"}),
        ("POST", "/predict", {"delta": "none", "text": "a"}),
        ("POST", "/models/mood", {"inputs": "the cat"}),
        ("POST", "/v1/embeddings", {"model": "sense", "input": "the cat"}),
        ("POST", "/tei/sense/embed", {"inputs": "the cat"}),
        ("POST", "/v2/models/mood/infer", TENSOR),
        ("GET", "/v2/models/mood/versions/1", None),
        ("GET", "/models/no%20such", None),
        ("GET", "/nowhere?x=1", None),
        ("PUT", "/predict", None),
    ]
    registry = Registry(Pipeline(encoder))
    registry.load(deltas)
    with running(registry.pipeline, None, deltas, registry) as one:
        for method, path, body in calls:
            ours, theirs = (asked.request(method, path, json=body) for asked in (client, one.client))
            assert (ours.status_code, ours.headers["content-type"]) == (
                theirs.status_code,
                theirs.headers["content-type"],
            )
            assert ours.status_code == 404 or tiny_close(ours.json(), theirs.json()), path
    assert client.post("/predict", headers={"X-API-Key": "no"}, json={}).status_code == 401
    large = client.post("/predict", content=b" " * (9 * 2**20))
    assert large.status_code == 413
    asked = client.get("/v2/health/ready", headers={"X-Request-ID": "mine"})
    assert asked.headers.get_list("x-request-id") == ["mine"]


def test_calls_meet_resident_deltas_and_at_random_they_do_not(client):
    names, by = [f"d{number}" for number in range(MANY)], dict[str, set[str]]()
    draw = random.Random(0)

    def ask(name: str) -> None:
        answer = client.post("/predict", json={"delta": name, "text": "the cat"})
        assert answer.json()["delta"] == name
        by.setdefault(name, set()).add(answer.headers["x-served-by"])

    for name in names * 3:  # by then what an engine held at its start, of others, has gone
        ask(name)
    engines = set.union(*by.values())
    assert len(engines) == 2
    before = loads(engines)
    for name in draw.sample(names, MANY):
        ask(name)
    assert 1 - (loads(engines) - before) / MANY >= 0.95
    assert all(len(found) == 1 for found in by.values())

    handle, before = serve.get_deployment_handle(ENGINES, "default"), loads(engines)
    for name in draw.choices(names, k=MANY):
        body, passed = b'{"delta": "%s", "text": "the cat"}' % name.encode(), draw.choice(sorted(engines))
        answer = handle.ask.remote(call_of("POST", "/predict", body, delta=name, tried=(passed,))).result()
        assert answer.status == 200
        assert answer.engine != passed
    assert 1 - (loads(engines) - before) / MANY <= 0.75


def test_a_delta_that_is_asked_much_spreads(client):
    handle = serve.get_deployment_handle(ENGINES, "default")

    def engines(tokens: float) -> set[str]:
        call = call_of("POST", "/predict", b'{"delta": "mood", "text": "the cat"}', delta="mood")._replace(
            tokens=tokens
        )
        under_way = [handle.ask.remote(call) for _ in range(8)]
        return {one.result().engine for one in under_way}

    assert len(engines(10.0)) == 1
    assert len(engines(1e6)) == 2


def test_an_engine_is_killed_and_no_call_is_lost(client, encoder, root):
    save_version(encoder, root, "mood", "2", 2)
    save_version(encoder, root, "mood", "3", 3)
    changed = client.post("/v2/repository/models/mood/load", json={"parameters": {"version": "2"}})
    assert changed.json()["version"] == "2"
    assert client.post("/v2/repository/models/nobody/load", json={}).status_code == 404
    assert read_desired(root.with_name("wanted.json")).deltas["mood"].version == "2"

    answers, ended = list[httpx.Response](), threading.Event()

    def ask(draw: random.Random) -> None:
        while not ended.is_set():
            name = draw.choice(["mood", *(f"d{number}" for number in range(MANY))])
            answers.append(client.post("/predict", json={"delta": name, "text": "the cat was good"}))

    threads = [threading.Thread(target=ask, args=(random.Random(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: len(answers) >= 50)
        before = {answer.headers["x-served-by"] for answer in answers}
        assert len(before) == 2
        names = ray_serve_names()
        ray.kill(ray.get_actor(names[0], namespace="serve"))
        killed = names[0].rpartition("#")[2]
        at = len(answers)
        wait(lambda: len(answers) >= at + 100)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert killed in before
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["version"] for answer in answers if answer.json()["delta"] == "mood"} == {"2"}

    def new() -> set[str]:
        time.sleep(0.2)  # on few cores it has to come up, too
        record = {"delta": f"d{next(count) % MANY}", "text": "the cat"}
        return {client.post("/predict", json=record).headers["x-served-by"]} - before

    count, come = itertools.count(), set[str]()
    wait(lambda: come.update(new()) or come)
    wait(lambda: len(ray_serve_names()) == 2)
    mood = call_of("POST", "/predict", b'{"delta": "mood", "text": "the cat"}')
    found = ask_each(before - {killed} | come, mood)
    assert {json.loads(one.body)["version"] for one in found.values()} == {"2"}  # though version 3 lies there


def ray_serve_names() -> list[str]:
    """The names of the engines' actors."""
    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if f"#{ENGINES}#" in one["name"]]


@pytest.mark.parametrize(
    ("waits", "now", "wanted"),
    [([0.3, 0.1], 2, 4), ([9.0], 2, 4), ([0.15, 0.06], 4, 5), ([0.05], 3, 3), ([0, 0], 2, 1)],
)
def test_engines_come_and_go_with_the_time_that_work_waits(waits, now, wanted):
    context = SimpleNamespace(aggregated_metrics={"queue_seconds": dict(enumerate(waits))}, target_num_replicas=now)
    assert ray_serve.scale_by_queue(context) == (wanted, {})


def test_nobody_knows_how_long_work_waits_and_nothing_changes():
    assert ray_serve.scale_by_queue(SimpleNamespace(aggregated_metrics=None, target_num_replicas=3)) == (3, {})


def call(path: str, body: bytes = b"") -> RayCall:
    return RayCall({"path": path}, body, None, 1.0)


def test_what_is_wanted_after_a_change():
    before = Desired({"mood": Wish("1", weight=2.0), "tone": Wish()})
    answer = RayAnswer(200, [], b'{"name": "mood", "version": "2", "state": "READY", "reason": ""}', "x")
    loaded = ray_serve._wanted(before, call("/v2/repository/models/mood/load"), answer)
    assert loaded.deltas == {"mood": Wish("2", weight=2.0), "tone": Wish()}
    gone = ray_serve._wanted(before, call("/v2/repository/models/tone/unload"), answer)
    assert gone.deltas["tone"] == Wish(loaded=False)
    whole = ray_serve._wanted(before, call("/v2/repository/state", b'{"deltas": {"x": {"version": "7"}}}'), answer)
    assert whole == Desired({"x": Wish("7")})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": "minilm"}, "expected backbone=NAME and deltas=DIRECTORY"),
        ({"backbone": "minilm", "deltas": "d", "replicas": "3-2"}, "replicas is '3-2'"),
        ({"backbone": "minilm", "deltas": "d", "replicas": "no"}, "replicas is 'no'"),
        ({"backbone": "minilm", "deltas": "d", "grpc_port": "1"}, "grpc_port"),
        ({"backbone": "minilm", "deltas": "d", "max_item": "1"}, "max_items"),
        ({"backbone": "minilm", "deltas": "d", "max_items": "many"}, "max_items"),
    ],
)
def test_arguments_that_make_no_sense(given, message):
    with pytest.raises(SpecError, match=message):
        ray_serve.app(given)


class Engines:
    """A handle whose engines answer as a test wants: a status, or an error, for each call one."""

    def __init__(self, *outcomes: int | Exception) -> None:
        self.outcomes, self.asked, self.ask = list(outcomes), list[RayCall](), self

    async def remote(self, call: RayCall) -> RayAnswer:
        self.asked.append(call)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return RayAnswer(outcome, [], b"{}", f"engine-{len(self.asked)}")

    def broadcast(self, method: str, call: RayCall) -> Engines:
        return self

    async def results_async(self) -> list[RayAnswer]:
        return [await self.remote(call("/")) for _ in list(self.outcomes)]


DIED = ray.exceptions.RayActorError()


@pytest.mark.parametrize(
    ("path", "outcomes", "status", "tried"),
    [
        ("/predict", [200], 200, [()]),
        ("/predict", [503, 200], 200, [(), ("engine-1",)]),
        ("/predict", [503, 503], 503, [(), ("engine-1",)]),
        ("/predict", [DIED, 200], 200, [(), ()]),
        ("/predict", [DIED, DIED], 503, [(), ()]),
        ("/predict", [ValueError("x")], 500, [()]),
        ("/v2/repository/models/mood/unload", [200, 200], 200, [(), ()]),
        ("/v2/repository/models/mood/unload", [200, 404], 404, [(), ()]),
        ("/v2/repository/models/mood/unload", [200, DIED], 503, [(), ()]),
    ],
)
def test_a_call_is_sent_again_once_and_a_change_never(path, outcomes, status, tried):
    engines = Engines(*outcomes)
    app = ray_serve.RayIngress(engines, ServerConfig()).__serve_build_asgi_app__()
    with TestClient(app) as client:
        answer = client.post(path, json={"delta": "mood"})
    assert answer.status_code == status
    assert [one.tried for one in engines.asked] == tried
    if path == "/predict":
        assert {one.delta for one in engines.asked} == {"mood"}


def test_the_command_has_ray_serve_what_it_would(monkeypatch, deltas):
    made = {}
    monkeypatch.setattr(ray_serve, "application", lambda *given, **options: made.update(given=given, options=options))
    monkeypatch.setattr(
        ray_serve, "serve_on_ray", lambda application, config, say: made.update(port=config.listen.port)
    )
    options = ["--ray-replicas", "2-4", "--engine", "torch", "--port", "7", "--max-items", "9"]
    assert main(["serve", "--backbone", "minilm", "--deltas", str(deltas), *options]) == 0
    backbone, directory, config, replicas = made["given"]
    assert (backbone, directory, replicas) == ("minilm", str(deltas), "2-4")
    assert (config.limits.max_items, made["port"], made["options"]["engine"]) == (9, 7, "torch")
