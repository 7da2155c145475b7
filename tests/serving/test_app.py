from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.protocol import json_codec
from bertology_serve.serving.service import INLINE
from bertology_serve.tasks import encoding
from tests.serving.conftest import DELTAS, RECORDS
from tests.serving.held import Held
from tests.serving.running import Running, running, wait


def test_one_call_for_all_deltas(server, pipeline):
    items = [{"delta": name, "id": i, **record} for i, (name, record) in enumerate(RECORDS.items())]
    response = server.post("/predict", items)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answers = response.json()
    assert [(answer["id"], answer["delta"]) for answer in answers] == list(enumerate(RECORDS))
    assert {answer["task"] for answer in answers} == {task.kind for _, task in DELTAS.values()}


def test_no_content_type_is_needed(server):
    request = server.client.build_request("POST", "/predict", content=b'{"delta": "mood", "text": "cat"}')
    assert "content-type" not in request.headers
    assert server.client.send(request).json()["delta"] == "mood"


LONG = "the cat was good " * 40
TENSOR = {"name": "text", "shape": [2], "datatype": "BYTES", "data": [LONG, "cat"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", [{"delta": "mood", "text": LONG}, {"delta": "mood", "text": "cat"}]),
        ("/models/mood", {"inputs": [LONG, "cat"]}),
        ("/v2/models/mood/infer", {"inputs": [TENSOR]}),
        ("/v1/embeddings", {"model": "sense", "input": [LONG, "cat"]}),
        ("/tei/sense/embed", {"inputs": [LONG, "cat"], "truncate": True}),
    ],
)
def test_every_protocol_says_what_was_cut(server, path, body):
    response = server.post(path, body)
    assert (response.status_code, response.headers["x-truncated"]) == (200, "1")
    if path == "/predict":
        one, other = response.json()
        assert (one["truncated"], one["tokens_read"], one["tokens_given"]) == (True, 32, 162)
        assert "truncated" not in other
    if path.startswith("/v2"):
        assert response.json()["parameters"] == {"truncated": "0"}
    whole = json.loads(json.dumps(body).replace(LONG, "dog"))
    assert "x-truncated" not in server.post(path, whole).headers


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies(server, encoding):
    plain = b'{"delta": "mood", "text": "cat"}'
    body = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    response = server.client.post("/predict", content=body, headers={"Content-Encoding": encoding})
    assert response.json()["delta"] == "mood"


def test_open_inference_protocol(server):
    get = server.client.get
    assert get("/v2").json()["extensions"][1:3] == ["model_repository", "model_configuration"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"ready": True}
    assert set(get("/v2/models").json()["models"]) == {"base", *DELTAS}
    for path in ("/v2/models/mood", "/v2/models/mood/versions/1"):
        assert get(path).json()["versions"] == ["1"]
        assert get(f"{path}/ready").json() == {"name": "mood", "ready": True}
        body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["cat"]}]}
        assert server.post(f"{path}/infer", body).json()["outputs"][0]["name"] == "label"


def test_binary_tensors_as_tritonclient_sends_them(server):
    raw = struct.pack("<I", 7) + b"the cat"
    head = json.dumps(
        {
            "inputs": [
                {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    response = server.client.post(
        "/v2/models/sense/infer", content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))}
    )
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers["inference-header-content-length"])
    (output,) = json.loads(response.content[:length])["outputs"]
    vector = np.frombuffer(response.content[length:], "<f4")
    assert output["parameters"]["binary_data_size"] == vector.nbytes
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


@pytest.fixture
def hub_session() -> Iterator[None]:
    """The tests' offline mode forbids this client even the loopback; a session without that hook does not."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(lambda: httpx.Client(timeout=120))
    yield
    set_client_factory(default_client_factory)


@pytest.mark.usefixtures("hub_session")
def test_the_client_library_of_huggingface(server):
    from huggingface_hub import InferenceClient

    def client(name: str) -> InferenceClient:
        return InferenceClient(provider="hf-inference", model=f"{server.url}/models/{name}", token="none")

    (first, *_) = client("mood").text_classification("the cat", top_k=2)
    assert first.label in ("bad", "good", "so-so")
    assert all(entity.entity_group for entity in client("names").token_classification("Ada went to Paris"))
    assert client("finder").question_answering(question="who", context="Ada met the dog").answer
    assert client("sense").feature_extraction(["the cat", "a dog"]).shape == (2, 32)
    assert client("sense").sentence_similarity("the cat", ["the cat", "a dog"])[0] == pytest.approx(1, abs=1e-6)
    assert client("mood").get_endpoint_info()["task"] == "classification"
    assert client("mood").health_check()


def test_what_a_person_looks_at(server):
    get = server.client.get
    assert get("/").json()["deltas"] == len(DELTAS) + 1
    assert get("/").json()["status"] == "alive"
    assert get("/health").json() == {"status": "ready"}
    assert [model["name"] for model in get("/models").json()] == ["base", *sorted(DELTAS)]
    assert get("/models/mood").json() == get("/models/mood/info").json()
    server.post("/predict", {"delta": "mood", "text": "cat"})
    metrics = get("/metrics").text
    assert 'bertology_items_total{delta="mood",outcome="answered"}' in metrics
    assert f"bertology_deltas {len(DELTAS) + 1}.0" in metrics
    assert 'bertology_calls_total{status="200"}' in metrics


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/predict", b"", 400, "the body is empty"),
        ("POST", "/predict", b"{", 400, "not JSON"),
        ("POST", "/predict", b"[]", 400, "no items"),
        ("POST", "/predict", b'{"delta": "mood", "text": ""}', 400, "field 'text' is empty"),
        ("POST", "/predict", b'{"delta": "mood", "text": 3}', 400, "field 'text' is 3"),
        ("POST", "/predict", b'{"delta": "moot", "text": "a"}', 404, "did you mean 'mood'"),
        ("POST", "/predict", b'{"delta": "../../etc/passwd", "text": "a"}', 404, "no delta"),
        ("POST", "/predict", b'{"delta": "mood", "text": "\\ud800"}', 400, ""),
        ("POST", "/predict", b'{"delta": "mood", "text": NaN}', 400, "not JSON"),
        ("POST", "/predict", b'{"delta": "mood", "text": 1e999}', 400, "out of range"),
        ("POST", "/predict", b'[{"delta": "mood", "text": "a"}, {"delta": "mood"}]', 400, "item 1: field 'text'"),
        ("POST", "/models/mood", b"{}", 400, "field 'inputs' is missing"),
        ("POST", "/models/moot", b'{"inputs": "a"}', 404, "no delta 'moot'"),
        ("GET", "/models/..%2f..%2fetc", None, 404, ""),
        ("POST", "/v2/models/mood/infer", b"{}", 400, "missing required field `inputs`"),
        ("POST", "/v2/models/mood/versions/9/infer", b"{}", 404, "no version '9'"),
        ("GET", "/v2/models/moot", None, 404, "no delta 'moot'"),
        ("GET", "/v2/models/moot/ready", None, 404, "no delta 'moot'"),
        ("GET", "/models/moot/health", None, 404, "no delta 'moot'"),
        ("GET", "/predict", None, 405, "GET is not for this path"),
        ("DELETE", "/models/mood", None, 405, "DELETE is not for this path"),
        ("GET", "/nothing", None, 404, "no such path"),
        ("GET", "/predict/", None, 404, "no such path"),
    ],
)  # fmt: skip
def test_bad_calls_are_told_what_is_wrong(server, method, path, body, status, message):
    response = server.client.request(method, path, content=body)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({"Content-Encoding": "br"}, b"x", "Content-Encoding 'br' is not supported"),
        ({"Content-Encoding": "gzip"}, b"no gzip at all", "not valid gzip"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"x" * 1000, mtime=0)[:-9], "cut short"),
        ({"Inference-Header-Content-Length": "x"}, b"{}", "expected a number of bytes"),
        ({"Inference-Header-Content-Length": "9" * 30}, b"{}", "expected a number of bytes"),
    ],
)
def test_bad_headers(server, headers, body, message):
    response = server.client.post("/v2/models/mood/infer", content=body, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_bodies_over_the_limit(pipeline):
    bomb = gzip.compress(b" " * 10**6)
    with running(pipeline, max_body_bytes=1000) as server:
        for headers, body in (({}, b"x" * 1001), ({"Content-Encoding": "gzip"}, bomb)):
            response = server.client.post("/predict", content=body, headers=headers)
            assert (response.status_code, response.json()) == (
                413,
                {"error": "the body is larger than 1000 bytes; send less in one call"},
            )
        streamed = server.client.post("/predict", content=iter([b"x" * 600, b"x" * 600]))
        assert streamed.status_code == 413
        assert server.client.post("/predict", content=b"x" * 1000).status_code == 400


def test_texts_and_calls_over_their_limits(pipeline):
    with running(pipeline, max_text_characters=10, max_items=2) as server:
        long = {"delta": "mood", "text": "x" * 11}
        assert server.post("/predict", long).status_code == 413
        short = {"delta": "mood", "text": "cat"}
        assert server.post("/predict", [short] * 2).status_code == 200
        assert server.post("/predict", [short] * 3).status_code == 413


MANY = ["the cat was good " * 30] * 9
LARGE: dict[str, Any] = {
    "/predict": [{"delta": "mood", "text": text} for text in MANY],
    "/models/mood": {"inputs": MANY},
    "/models/sense": {"inputs": {"source_sentence": "cat", "sentences": MANY}},
    "/v2/models/mood/infer": {"inputs": [{"name": "text", "shape": [9], "datatype": "BYTES", "data": MANY}]},
    "/v1/embeddings": {"model": "sense", "input": MANY},
    "/embed": {"model": "sense", "inputs": MANY, "truncate": True},
    "/tei/mood/predict": {"inputs": [[text] for text in MANY], "truncate": True},
    "/rerank": {"model": "grade", "query": "cat", "texts": MANY, "truncate": True},
    "/similarity": {"model": "sense", "inputs": {"source_sentence": "cat", "sentences": MANY}, "truncate": True},
    "/tokenize": {"inputs": MANY},
    "/decode": {"ids": [[7] * 300] * 9},
}


@pytest.mark.parametrize("path", LARGE)
def test_what_is_large_is_read_and_tokenised_beside_the_event_loop(server, path, monkeypatch):
    seen = list[str]()

    def noted(work: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            seen.append(threading.current_thread().name)
            return work(*args, **options)

        return run

    monkeypatch.setattr(json_codec.msgspec.json, "decode", noted(json_codec.msgspec.json.decode))
    monkeypatch.setattr(encoding, "_encoded", noted(encoding._encoded))
    body = json.dumps(LARGE[path]).encode()
    assert len(body) > INLINE
    assert server.post(path, body).status_code == 200
    assert seen
    assert [name for name in seen if not name.startswith("tokenizer")] == []


@pytest.mark.parametrize("path", [path for path in LARGE if path not in ("/decode", "/tokenize")])
def test_items_are_counted_before_requests_are_made(pipeline, path, monkeypatch):
    made = list[int]()
    monkeypatch.setattr(pipeline, "prepare", made.append)
    with running(pipeline, max_items=8) as server:
        response = server.post(path, LARGE[path])
    assert response.status_code == 413
    assert "at most 8" in response.text
    assert made == []


def test_a_fault_is_a_500_that_tells_and_logs_no_text(server, pipeline, monkeypatch, caplog):
    def fault(jobs: Any) -> Any:
        raise RuntimeError("about SECRET")

    monkeypatch.setattr(server.server.service._executor, "_run", fault)
    response = server.post("/predict", {"delta": "mood", "text": "SECRET"})
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed on this call; the fault is in its log"}
    assert "RuntimeError at" in caplog.text
    assert "SECRET" not in caplog.text + response.text


def test_a_full_queue_is_a_503_with_retry_after(pipeline):
    held = Held(pipeline)
    with running(held, max_queue_tokens=8, max_item_tokens=8) as server:
        threads = [threading.Thread(target=send, args=(server, "the cat")) for _ in range(3)]
        queue = server.server.service.queue
        for number, thread in enumerate(threads):
            thread.start()
            assert held.busy.wait(20)  # the first is with the executor
            wait(lambda number=number: queue.items == number)
        response = server.post("/predict", {"delta": "mood", "text": "a dog"})
        held.go.set()
        for thread in threads:
            thread.join(120)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "the queue is full" in response.json()["error"]
        assert held.texts == ["the cat"] * 3


def send(server: Running, text: str) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", json={"delta": "mood", "text": text}, timeout=120)


def test_who_hangs_up_costs_nothing(pipeline):
    held = Held(pipeline)
    with running(held) as server:
        first = threading.Thread(target=send, args=(server, "first"))
        first.start()
        queue = server.server.service.queue
        assert held.busy.wait(20)
        body = b'{"delta": "mood", "text": "gone"}'
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as left:
            left.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait(lambda: queue.items >= 1)
        wait(lambda: queue.items == 0)
        held.go.set()
        first.join(120)
        assert held.texts == ["first"]


INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["late"]}]}


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/predict", {"delta": "mood", "text": "late"}, {"X-Request-Timeout-Ms": "20"}),
        ("/models/mood", {"inputs": "late"}, {"X-Request-Timeout-Ms": "20"}),
        ("/v2/models/mood/infer", INFER, {"X-Request-Timeout-Ms": "20"}),
        ("/v2/models/mood/infer", INFER | {"parameters": {"timeout": 20_000}}, {}),
    ],
)
def test_a_caller_may_set_a_deadline(pipeline, path, body, headers):
    held = Held(pipeline)
    with running(held) as server:
        first = threading.Thread(target=send, args=(server, "first"))
        first.start()
        assert held.busy.wait(20)
        response = server.client.post(path, json=body, headers=headers)
        assert (response.status_code, response.json()) == (
            504,
            {"error": "no answer within 0.02 s; send less, later, or allow more time"},
        )
        held.go.set()
        first.join(120)
        assert held.texts == ["first"]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "", "9" * 30])
def test_deadlines_that_make_no_sense(server, value):
    headers = {"X-Request-Timeout-Ms": value}
    response = server.client.post("/predict", json={"delta": "mood", "text": "cat"}, headers=headers)
    assert response.status_code == 400
    assert "expected a whole number of milliseconds" in response.json()["error"]
    infer = INFER | {"parameters": {"timeout": value}}
    assert server.post("/v2/models/mood/infer", infer).status_code == 400


def test_a_deadline_beyond_all_numbers_is_none(server):
    for timeout in (0, 2**63, 10**17):
        assert server.post("/v2/models/mood/infer", INFER | {"parameters": {"timeout": timeout}}).status_code == 200


def test_a_full_queue_of_one_delta_is_a_429_with_retry_after(pipeline):
    held = Held(pipeline)
    with running(held, max_delta_tokens=8, max_item_tokens=8) as server:
        threads = [threading.Thread(target=send, args=(server, "the cat")) for _ in range(3)]
        queue = server.server.service.queue
        for number, thread in enumerate(threads):
            thread.start()
            assert held.busy.wait(20)
            wait(lambda number=number: queue.items == number)
        response = server.post("/predict", {"delta": "mood", "text": "a dog"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        other = threading.Thread(target=server.post, args=("/predict", {"delta": "sense", "text": "a dog"}))
        other.start()
        wait(lambda: queue.items == 3)
        held.go.set()
        for thread in (*threads, other):
            thread.join(120)


def test_readiness_and_answers_while_draining(pipeline):
    held = Held(pipeline)
    with running(held, drain_seconds=0.5) as server:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(send(server, "the cat")))
        thread.start()
        assert held.busy.wait(20)
        server.server.drain()
        assert server.client.get("/v2/health/ready").status_code == 503
        assert server.client.get("/v2/models/mood/ready").status_code == 503
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/health").json() == {"status": "draining"}
        held.go.set()
        assert server.post("/predict", {"delta": "mood", "text": "a dog"}).status_code == 200
        thread.join(120)
        assert accepted[0].status_code == 200
        wait(lambda: server.server.should_exit)


def test_many_clients_at_once_get_their_own_answers(server, pipeline):
    texts = [f"{'the ' * (i % 5)}cat{' was good' * (i % 3)}" for i in range(60)]

    async def go() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            calls = [client.post("/predict", json={"delta": "mood", "text": text, "id": text}) for text in texts]
            return [response.json() for response in await asyncio.gather(*calls)]

    alone = {text: server.post("/predict", {"delta": "mood", "text": text}).json()["scores"] for text in set(texts)}
    for text, answer in zip(texts, asyncio.run(go()), strict=True):
        assert answer["id"] == text
        assert answer["scores"] == pytest.approx(alone[text], abs=1e-5)


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "9" * 12])
def test_priorities_that_make_no_sense(server, value):
    headers = {"X-Request-Priority": value}
    response = server.client.post("/predict", json={"delta": "mood", "text": "cat"}, headers=headers)
    assert response.status_code == 400
    assert "1 goes first" in response.json()["error"]
    assert server.post("/v2/models/mood/infer", INFER | {"parameters": {"priority": value}}).status_code == 400


def test_what_is_urgent_goes_first_and_a_full_queue_is_told_before_tokenising(pipeline, monkeypatch):
    held = Held(pipeline)
    with running(held, max_queue_tokens=8, max_item_tokens=8) as server:
        queue = server.server.service.queue

        def ask(text: str, **headers: str) -> threading.Thread:
            call = lambda: server.client.post("/predict", json={"delta": "mood", "text": text}, headers=headers)  # noqa: E731
            thread = threading.Thread(target=call)
            thread.start()
            return thread

        threads = [ask("first")]
        assert held.busy.wait(20)
        threads.append(ask("patient"))
        wait(lambda: queue.items == 1)
        server.server.service.queue.times.budget = 1
        queue._scheduler.max_tokens = 1
        threads.append(ask("urgent", **{"X-Request-Priority": "1"}))
        wait(lambda: queue.items == 2)
        with monkeypatch.context() as patch:
            patch.setattr(queue, "max_tokens", queue.tokens)
            patch.setattr(held, "prepare", lambda request: pytest.fail("tokenised in vain"), raising=False)
            assert server.post("/predict", {"delta": "mood", "text": "late"}).status_code == 503
        held.go.set()
        for thread in threads:
            thread.join(120)
        assert held.texts[0] == "first"
        assert held.texts.index("urgent") < held.texts.index("patient")


ORIGIN = "https://app.example"


def test_browsers_may_call_where_that_is_allowed_and_nowhere_else(server, pipeline):
    ring = Keyring([Key("all", digest_of("all-0123456789abcdef", ""))])
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    assert server.client.options("/predict", headers=asked).status_code == 405
    assert not [name for name in server.client.get("/v2", headers=asked).headers if name.startswith("access-control")]
    with running(pipeline, ring, cors_origin=(ORIGIN,)) as opened:
        preflight = opened.client.options("/predict", headers=asked)  # without a key, as browsers send it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "x-api-key" in preflight.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in preflight.headers
        refused = opened.client.get("/v2", headers={"Origin": ORIGIN})  # pages can read why
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
        told = opened.client.get("/v2", headers={"Origin": ORIGIN, "X-API-Key": "all-0123456789abcdef"})
        assert told.status_code == 200
        assert "X-Request-Id" in told.headers["access-control-expose-headers"]
        for headers in ({**asked, "Origin": "https://evil.example"}, {**asked, "Origin": f"{ORIGIN}.evil"}):
            assert "access-control-allow-origin" not in opened.client.options("/predict", headers=headers).headers
        assert opened.client.options("/predict").status_code == 401


def test_big_answers_are_compressed_where_that_is_asked_for(server, pipeline):
    item = [{"delta": "sense", "text": "the cat"}] * 20
    plain = server.post("/predict", item, headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    with running(pipeline, gzip_bytes=2000) as small:
        packed = small.post("/predict", item, headers={"Accept-Encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.headers["vary"] == "Accept-Encoding"
        assert int(packed.headers["content-length"]) < len(packed.content) == len(plain.content)
        assert packed.json()[0].keys() == plain.json()[0].keys()
        assert "content-encoding" not in small.post("/predict", item, headers={"Accept-Encoding": "identity"}).headers
        assert "content-encoding" not in small.post("/predict", item[:1], headers={"Accept-Encoding": "gzip"}).headers
        tensor = triton.InferInput("text", [20], "BYTES")
        tensor.set_data_from_numpy(np.array([b"the cat"] * 20, object))
        with triton.InferenceServerClient(small.url.removeprefix("http://").rstrip("/")) as client:
            vectors = client.infer("sense", [tensor], response_compression_algorithm="gzip").as_numpy("embedding")
        assert vectors[19] == pytest.approx(plain.json()[19]["embedding"], abs=1e-6)
