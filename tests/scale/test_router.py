"""The router: which replica answers, what is sent again, what a change does, what survives."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import InputError, NotFound, SpecError
from bertology_serve.scale.config import ReplicaConfig, RouteConfig, RouterConfig
from bertology_serve.scale.placement import ordered
from bertology_serve.scale.router import route
from bertology_serve.serving.http.listening import bind
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.desired import Wish, read_desired
from tests import tiny
from tests.scale.routed import OK, answer_ok, first_of, hang_up, refuse, replica, routing
from tests.serving.conftest import RECORDS, save_version
from tests.serving.running import ROUTED, Running, running, wait

ADMIN, USER = "an-admin-key-of-the-tests", "a-user-key-of-the-tests"
RING = [Key("admin", digest_of(ADMIN, ""), admin=True), Key("user", digest_of(USER, ""))]
ITEM = {"delta": "mood", "text": "the cat was good"}
TENSOR = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the cat"]}]}


@pytest.fixture(scope="module")
def servers(deltas, tmp_path_factory) -> Iterator[list[Running]]:
    """Two servers of the same deltas, each with an encoder of its own."""
    with ExitStack() as stack:
        found = []
        for number in range(2):
            encoder = tiny.encoder("bert", tmp_path_factory.mktemp("replica") / str(number))
            registry = Registry(Pipeline(encoder))
            registry.load(deltas)
            found.append(stack.enter_context(running(registry.pipeline, None, deltas, registry)))
        yield found


def addresses(servers: list[Running]) -> list[str]:
    return [one.url.rstrip("/") for one in servers]


def same(one: httpx.Response, other: httpx.Response) -> None:
    """The same answer but for what names the call."""
    ignored = {"x-request-id", "x-served-by", "content-length", "date"}
    assert one.status_code == other.status_code
    assert "content-length" in one.headers
    assert len(one.headers.get_list("date")) == 1

    def kept(answer: httpx.Response) -> dict[str, str]:
        return {name: value for name, value in answer.headers.items() if name not in ignored}

    assert kept(one) == kept(other)
    if one.content != other.content:  # another batch, other roundings
        assert tiny_close(one.json(), other.json())


def tiny_close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            name in ("created", "id") or tiny_close(one[name], other[name]) for name in one
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(tiny_close, one, other))
    return bool(one == pytest.approx(other, abs=1e-5) if isinstance(one, float) else one == other)


def test_calls_of_every_shape_come_back_as_they_are(servers):
    calls: list[tuple[str, str, Any]] = [
        *(("POST", "/predict", {"delta": name, **record}) for name, record in RECORDS.items()),
        ("POST", "/predict", [{"delta": name, **record} for name, record in RECORDS.items()]),
        ("POST", "/predict", {"deltas": ["mood", "topics"], "text": "a good film"}),
        ("POST", "/predict", {"delta": "none", "text": "a"}),
        ("POST", "/predict", {"delta": 5}),
        ("POST", "/models/mood", {"inputs": "the cat"}),
        ("POST", "/v1/embeddings", {"model": "sense", "input": "the cat"}),
        ("POST", "/tei/sense/embed", {"inputs": "the cat"}),
        ("POST", "/v2/models/mood/infer", TENSOR),
        ("GET", "/v2/models/mood/versions/1", None),
        ("HEAD", "/models/mood", None),
        ("GET", "/models/no%20such", None),
        ("GET", "/v2/models", None),
        ("GET", "/nowhere?x=1", None),
        ("GET", "/openapi.json", None),
        ("PUT", "/predict", None),
    ]
    with routing(addresses(servers)) as routed:
        wait(lambda: len(routed.ready) == 2)
        for method, path, body in calls:
            same(routed.client.request(method, path, json=body), servers[0].client.request(method, path, json=body))
        large = {"delta": "raw", "text": "the cat"}
        same(routed.client.post("/predict", json=[large] * 900), servers[0].client.post("/predict", json=[large] * 900))


def test_a_delta_lives_on_one_replica_whatever_the_protocol(servers):
    with routing(addresses(servers)) as routed:
        wait(lambda: len(routed.ready) == 2)
        seen = set()
        for name in RECORDS:
            answers = [routed.client.post("/predict", json={"delta": name, **RECORDS[name]}) for _ in range(3)]
            answers.append(routed.client.get(f"/v2/models/{name}"))
            by = {answer.headers["x-served-by"] for answer in answers}
            assert by == {ordered(name, tuple(sorted(addresses(servers))))[0]}
            seen |= by
        assert len(seen) == 2


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("answer", [hang_up, refuse])
def test_what_no_replica_has_begun_to_answer_is_sent_to_another(answer):
    with replica(answer) as bad, replica(answer_ok) as good, routing([bad.url, good.url]) as routed:
        wait(lambda: len(routed.ready) == 2)
        reply = routed.client.post("/predict", json={"delta": first_of(bad.url, good.url), "text": "a"})
        assert (reply.status_code, reply.headers["x-served-by"]) == (200, good.url)
        assert (len(bad.asked), len(good.asked)) == (1, 1)
        assert bad.asked[0].split(b"\r\n\r\n")[1] == good.asked[0].split(b"\r\n\r\n")[1]
        assert "bertology_router_retries_total" in routed.client.get("/metrics").text


def test_what_ends_two_replicas_does_not_end_a_third():
    with ExitStack() as stack:
        fakes = [stack.enter_context(replica(hang_up)) for _ in range(3)]
        routed = stack.enter_context(routing([one.url for one in fakes]))
        wait(lambda: len(routed.ready) == 3)
        reply = routed.client.post("/predict", json=ITEM)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert "two" in reply.json()["error"]
        assert sum(len(one.asked) for one in fakes) == 2


async def half(head: bytes, writer: Any) -> None:
    writer.write(OK.replace(b"length: 2", b"length: 200"))
    await writer.drain()
    writer.close()


def test_an_answer_that_has_begun_is_not_asked_for_again():
    with replica(half) as bad, replica(answer_ok) as good, routing([bad.url, good.url]) as routed:
        wait(lambda: len(routed.ready) == 2)
        reply = routed.client.post("/predict", json={"delta": first_of(bad.url, good.url), "text": "a"})
        assert reply.status_code == 503
        assert "ended while it answered" in reply.json()["error"]
        assert not good.asked


def test_a_long_answer_that_is_cut_off_ends_the_connection():
    async def long(head: bytes, writer: Any) -> None:
        writer.write(OK.replace(b"length: 2", b"length: 1000000") + b"x" * 400_000)
        await writer.drain()
        writer.close()

    async def whole(head: bytes, writer: Any) -> None:
        writer.write(OK.replace(b"length: 2", b"length: 1000002") + b"x" * 1_000_000)

    with replica(long) as bad, routing([bad.url]) as routed:
        wait(lambda: routed.ready)
        with pytest.raises(httpx.RemoteProtocolError):
            routed.client.post("/predict", json=ITEM)
    with replica(whole) as good, routing([good.url]) as routed:
        wait(lambda: routed.ready)
        assert len(routed.client.post("/predict", json=ITEM).content) == 1_000_002


def test_where_all_are_full_the_caller_hears_what_they_say():
    with replica(refuse) as one, replica(refuse) as other, routing([one.url, other.url]) as routed:
        wait(lambda: len(routed.ready) == 2)
        reply = routed.client.post("/predict", json=ITEM)
        assert (reply.status_code, reply.headers["retry-after"], reply.content) == (503, "3", b"{}")
        assert (len(one.asked), len(other.asked)) == (1, 1)


def test_nobody_listens_and_then_somebody_does():
    with replica(answer_ok) as good, routing(["http://127.0.0.1:9", good.url]) as routed:
        wait(lambda: routed.ready == {good.url})
        delta = first_of("http://127.0.0.1:9", good.url)
        assert routed.client.post("/predict", json={"delta": delta, "text": "a"}).status_code == 200
        good.ready = False
        wait(lambda: not routed.ready)
        reply = routed.client.post("/predict", json={"delta": delta, "text": "a"})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert routed.client.get("/v2/health/ready").status_code == 503
        assert routed.client.get("/v2/health/live").status_code == 200
        good.ready = True
        wait(lambda: routed.ready)
        assert routed.client.get("/v2/health/ready").status_code == 200
        assert routed.client.get("/health").json() == {"status": "ready"}


def test_deadlines_priorities_keys_and_queries_are_passed_on_and_what_is_between_hosts_is_not():
    with replica(refuse) as first, replica(answer_ok) as second, routing([first.url, second.url]) as routed:
        wait(lambda: len(routed.ready) == 2)
        headers = {"X-Request-Timeout-Ms": "60000", "X-Request-Priority": "2", "Authorization": "Bearer abc",
                   "Connection": "keep-alive", "TE": "trailers", "Accept": "x/y"}  # fmt: skip
        delta = first_of(first.url, second.url)
        assert routed.client.post(f"/tei/{delta}/embed?a=b%20c", content=b"{}", headers=headers).status_code == 200
        head = second.asked[0].split(b"\r\n\r\n")[0]
        assert head.startswith(b"POST /tei/%s/embed?a=b%%20c HTTP/1.1" % delta.encode())
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        assert 0 < int(fields[b"x-request-timeout-ms"]) <= 60000
        assert (fields[b"x-request-priority"], fields[b"authorization"]) == (b"2", b"bearer abc")
        assert fields[b"accept"] == b"x/y"
        assert b"te" not in fields
        assert fields[b"host"] == second.url.removeprefix("http://").encode()


def test_odd_bytes_reach_the_replica():
    with replica(answer_ok) as only, routing([only.url]) as routed:
        wait(lambda: routed.ready)
        with socket.create_connection(("127.0.0.1", int(routed.url.rpartition(":")[2].strip("/"))), 60) as wire:
            wire.sendall(
                b"GET /models/a%20b%2F..?q=1&%zz= HTTP/1.1\r\nHost: x\r\nX-A: caf\xc3\xa9\r\nX-B: \xe9\r\n\r\n"
            )
            assert wire.recv(65536).startswith(b"HTTP/1.1 200")
        assert only.asked[0].startswith(b"GET /models/a%20b%2F..?q=1&%zz= HTTP/1.1")
        assert b"caf\xc3\xa9" in only.asked[0]


def test_bounds_of_a_call():
    async def never(head: bytes, writer: Any) -> None:
        await asyncio.sleep(3600)

    with replica(never) as slow, routing([slow.url], max_body_bytes=1000, max_call_seconds=0.3) as routed:
        wait(lambda: routed.ready)
        assert routed.client.post("/predict", content=b"x" * 1001).status_code == 413
        late = routed.client.post("/predict", json=ITEM)
        assert late.status_code == 504
        assert len(slow.asked) == 1, "nobody knows whether it was computed"


def test_a_caller_that_hangs_up_is_not_waited_for():
    gone = threading.Event()

    async def notice(head: bytes, writer: asyncio.StreamWriter) -> None:
        while not writer.transport.is_closing():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # so that it hears of the end
            await asyncio.sleep(0.01)
        gone.set()

    with replica(notice) as slow, routing([slow.url]) as routed:
        wait(lambda: routed.ready)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{routed.url}/predict", json=ITEM, timeout=httpx.Timeout(60, read=0.3))
        assert gone.wait(60)
        wait(lambda: routed.router.placement.replicas[slow.url].load == 0)


@pytest.fixture
def versions_root(servers, tmp_path) -> Path:
    encoder = servers[0].server.service.pipeline.encoder
    for version in ("1", "2", "3"):
        save_version(encoder, tmp_path, "mood", version, int(version))
    save_version(encoder, tmp_path, "grade", "1", 9, like="grade")
    return tmp_path


@pytest.fixture
def fleet(servers, versions_root) -> Iterator[list[Running]]:
    """Two servers of a directory with several versions, with keys; version 3 of mood answers."""
    with ExitStack() as stack:
        found = []
        for one in servers:
            registry = Registry(Pipeline(one.server.service.pipeline.encoder))
            registry.load(versions_root)
            found.append(stack.enter_context(running(registry.pipeline, Keyring(RING), versions_root, registry)))
            found[-1].client.headers["X-API-Key"] = USER
        yield found


def version_at(one: Running) -> str:
    reply = one.post("/predict", ITEM)
    return str(reply.json()["version"]) if reply.status_code == 200 else str(reply.status_code)


def test_a_version_is_published_on_all_and_one_that_comes_back_gets_it_first(fleet, tmp_path):
    state = tmp_path / "state.json"
    with routing(addresses(fleet), ADMIN, state_file=state) as routed:
        wait(lambda: len(routed.ready) == 2)
        load = "/v2/repository/models/mood/load"
        body = {"parameters": {"version": "1"}}
        assert routed.client.post(load, json=body, headers={"X-API-Key": USER}).status_code == 403
        assert [version_at(one) for one in fleet] == ["3", "3"]
        routed.client.headers["X-API-Key"] = ADMIN
        assert routed.client.post(load, json={"parameters": {"version": "9"}}).status_code == 404
        assert [version_at(one) for one in fleet] == ["3", "3"]
        reply = routed.client.post(load, json=body)
        assert reply.json() == {"name": "mood", "version": "1", "state": "READY", "reason": ""}
        assert [version_at(one) for one in fleet] == ["1", "1"]
        assert routed.client.post("/v2/repository/models/mood/rollback").json()["version"] == "3"
        assert [version_at(one) for one in fleet] == ["3", "3"]
        assert routed.client.post("/v2/repository/models/grade/unload").status_code == 200
        assert read_desired(state).deltas == {"mood": Wish(version="3"), "grade": Wish(loaded=False)}
        # one that was away meanwhile: it comes back as it was before, and gets what is wanted before it gets calls
        fleet[0].server.service._ready = False
        wait(lambda: len(routed.ready) == 1)
        assert routed.client.post(load, json={"parameters": {"version": "2"}}).json()["version"] == "2"
        assert [version_at(one) for one in fleet] == ["3", "2"]
        fleet[0].server.service._ready = True
        wait(lambda: len(routed.ready) == 2)
        assert [version_at(one) for one in fleet] == ["2", "2"]
        wanted = {"deltas": {"mood": {"version": "1", "canary": {"version": "3", "share": 1.0}}, "grade": {}}}
        assert routed.client.post("/v2/repository/state", json=wanted).json() == {"failed": {}}
        assert [version_at(one) for one in fleet] == ["3", "3"]
        assert routed.client.post("/v2/repository/state", json={"deltas": {"x": {}}}).json()["failed"].keys() == {"x"}
        assert routed.client.post("/v2/repository/state", json={"deltas": 5}).status_code == 400
        anonymous = routed.client.post("/v2/repository/state", json={"deltas": 5}, headers={"X-API-Key": "x"})
        assert anonymous.status_code == 401
    with routing(addresses(fleet), ADMIN, state_file=state) as again:
        assert again.router.replicas.desired.deltas == {"x": Wish()}


def test_while_a_version_is_published_no_call_goes_back_to_the_one_before(fleet):
    with routing(addresses(fleet), ADMIN) as routed:
        wait(lambda: len(routed.ready) == 2)
        seen, ended = list[list[str]](), threading.Event()

        def ask() -> None:
            own: list[str] = []
            seen.append(own)
            with httpx.Client(base_url=routed.url, timeout=120, headers={"X-API-Key": USER}) as client:
                while not ended.is_set():
                    reply = client.post("/predict", json=[ITEM, ITEM])
                    assert reply.status_code == 200
                    versions = {answer["version"] for answer in reply.json()}
                    assert len(versions) == 1
                    own.append(versions.pop())

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        try:
            for version in ("1", "2", "3", "1"):
                time.sleep(0.05)
                body = {"parameters": {"version": version}}
                reply = routed.client.post("/v2/repository/models/mood/load", json=body, headers={"X-API-Key": ADMIN})
                assert reply.json()["version"] == version
        finally:
            ended.set()
            for asker in askers:
                asker.join(120)
        for own in seen:
            assert own
            runs = [version for at, version in enumerate(own) if at == 0 or own[at - 1] != version]
            assert "".join(runs) in "31231", "one version after the other, none twice"


@pytest.mark.parametrize("how", ["unload", "state"])
def test_every_change_goes_to_one_replica_out_of_the_way_of_calls(fleet, how, monkeypatch):
    """While the first does it, calls are sent to the other; while that one does, to the first."""
    bodies = {"unload": b"", "state": json.dumps({"deltas": {"mood": {"version": "1"}}}).encode()}
    paths = {"unload": "/v2/repository/models/mood/unload", "state": "/v2/repository/state"}
    with routing(addresses(fleet), ADMIN) as routed:
        wait(lambda: len(routed.ready) == 2)
        seen, ask = list[set[str]](), routed.router.replicas._ask

        async def noting(method: str, state: Any, path: str, *rest: Any) -> Any:
            if method == "POST":
                able = routed.router.placement.homes("mood")
                assert able != [state.name]
                seen.append({state.name, *able})
            return await ask(method, state, path, *rest)

        monkeypatch.setattr(routed.router.replicas, "_ask", noting)
        reply = routed.client.post(paths[how], content=bodies[how], headers={"X-API-Key": ADMIN})
        assert reply.status_code == 200, reply.text
        assert seen == [set(addresses(fleet))] * 2
        assert not any(one.stale for one in routed.router.placement.replicas.values())


def test_a_replica_that_cannot_follow_gets_no_calls_for_that_delta(fleet, versions_root, monkeypatch):
    monkeypatch.setattr("bertology_serve.scale.replicas.RETRY_SECONDS", 0.05)
    with routing(addresses(fleet), ADMIN) as routed:
        wait(lambda: len(routed.ready) == 2)
        routed.client.headers["X-API-Key"] = ADMIN
        first, *_, last = routed.router.placement.in_order("mood")
        broken = next(one for one in fleet if one.url.rstrip("/") == first.name)
        put, grade = broken.server.service.registry.put, "/v2/repository/models/grade/"
        assert routed.client.post(grade + "load").status_code == 200
        monkeypatch.setattr(broken.server.service.registry, "put", lambda *_: (_ for _ in ()).throw(NotFound("gone")))
        reply = routed.client.post("/v2/repository/models/mood/load", json={"parameters": {"version": "1"}})
        assert reply.json()["version"] == "1"
        assert first.name in reply.json()["reason"]
        asked = [routed.client.post("/predict", json=ITEM) for _ in range(3)]
        assert {(one.json()["version"], one.headers["x-served-by"]) for one in asked} == {("1", last.name)}
        assert broken.client.post(grade + "unload", headers={"X-API-Key": ADMIN}).status_code == 200
        monkeypatch.setattr(broken.server.service.registry, "put", put)
        wait(lambda: not first.stale)
        assert version_at(broken) == "1"
        assert broken.post("/predict", ITEM | {"delta": "grade"}).status_code == 404, "what is there by hand stays so"


def test_without_a_key_a_replica_that_could_not_follow_stays_without_calls(fleet, monkeypatch):
    monkeypatch.setattr("bertology_serve.scale.replicas.RETRY_SECONDS", 0.02)
    with routing(addresses(fleet)) as routed:
        wait(lambda: len(routed.ready) == 2)
        first = routed.router.placement.in_order("mood")[0]
        broken = next(one for one in fleet if one.url.rstrip("/") == first.name)
        monkeypatch.setattr(broken.server.service.registry, "put", lambda *_: (_ for _ in ()).throw(NotFound("gone")))
        body, headers = {"parameters": {"version": "1"}}, {"X-API-Key": ADMIN}
        assert routed.client.post("/v2/repository/models/mood/load", json=body, headers=headers).status_code == 200
        time.sleep(0.3)
        assert first.stale == {"mood"}
        asked = [routed.client.post("/predict", json=ITEM, headers={"X-API-Key": USER}) for _ in range(3)]
        assert {one.json()["version"] for one in asked} == {"1"}


def test_its_own_answers_have_an_id_as_those_of_a_server_have(servers):
    own = (("GET", "/health"), ("GET", "/metrics"), ("POST", "/v2/repository/state"), ("POST", "/predict"))
    with routing(addresses(servers), max_body_bytes=1000) as routed:
        wait(lambda: len(routed.ready) == 2)
        for method, path in own:
            body = None if method == "GET" else b"{" if "state" in path else bytes(2000)
            for given, kept in (("call-7", True), ("a b<", False), ("", False), ("x" * 129, False)):
                headers = {"X-Request-Id": given} if given else {}
                answer = routed.client.request(method, path, content=body, headers=headers)
                (found,) = answer.headers.get_list("x-request-id")
                assert found == given if kept else re.fullmatch("[0-9a-f]{32}", found), (path, answer.status_code)


def test_metrics_need_the_key_of_the_router_where_there_is_one(servers):
    with routing(addresses(servers), ADMIN) as routed:
        refused = routed.client.get("/metrics", headers={"X-Request-Id": "call-7"})
        assert (refused.status_code, refused.headers["x-request-id"]) == (401, "call-7")
        for headers in ({"X-API-Key": ADMIN}, {"Authorization": f"Bearer {ADMIN}"}):
            page = routed.client.get("/metrics", headers=headers)
            assert page.status_code == 200
            assert "bertology_router_ready{" in page.text


def test_residency_and_capacity_are_read_from_the_replicas(servers, monkeypatch):
    monkeypatch.setattr("bertology_serve.scale.replicas.SCRAPE_SECONDS", 0.01)
    with routing(addresses(servers)) as routed:
        wait(lambda: len(routed.ready) == 2)
        states = routed.router.placement.replicas.values()
        wait(lambda: all("mood" in one.resident for one in states))
        item = {"delta": "raw", "text": "the cat was good " * 8}
        while not any(one.capacity for one in states):
            assert routed.client.post("/predict", json=[item] * 200).status_code == 200


def test_a_file_of_replicas_is_followed(servers, tmp_path):
    one, other = addresses(servers)
    file = tmp_path / "replicas"
    file.write_text(f"# ours\n{one}/\n\n")
    with routing([], replicas_file=file) as routed:
        wait(lambda: routed.ready == {one})
        file.write_text(f"{one}\n{other}\n")
        wait(lambda: routed.ready == {one, other})
        for wrong in ("nonsense\n", ""):
            file.write_text(wrong)
            time.sleep(0.1)
            assert routed.ready == {one, other}, "what was there before is used"
        file.write_text(f"{other}\n")
        wait(lambda: routed.ready == {other})


def test_a_taken_port_for_envoy_is_said_before_anything_listens():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        config = RouterConfig(ReplicaConfig(("http://127.0.0.1:1",)), RouteConfig(port=0, ext_proc_port=port))
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is taken; .* choose another --ext-proc-port"):
            route(config)


def test_options_that_make_no_sense(tmp_path):
    for wrong in ({}, {"replicas": ("http://a",), "replicas_file": tmp_path}, {"replicas": ("a:8000",)},
                  {"replicas": ("http://a/path",)}, {"replicas": ("http://a",), "poll_seconds": 0}):  # fmt: skip
        with pytest.raises(SpecError):
            ReplicaConfig(**wrong)
    with pytest.raises(NotFound):
        ReplicaConfig(replicas_file=tmp_path / "none").addresses()


def test_what_others_wrote_for_the_server_works_through_the_router():
    """The tests of the client libraries and of the protocols, once more; see ``running``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "tests/serving/clients", "tests/serving/protocol", "tests/serving/http/test_routes.py",
               "-k", "not test_what_a_person_looks_at"]  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, env=environ | {ROUTED: "1"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200  # type: ignore[index]
