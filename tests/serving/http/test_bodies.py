"""Bodies of calls and answers: encodings, limits, where they are read."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from bertology_serve.serving.http.bodies import takes_gzip
from bertology_serve.serving.protocol import json_codec
from bertology_serve.serving.service import INLINE
from bertology_serve.tasks import encoding
from tests.serving.running import running


def test_no_content_type_is_needed(server):
    request = server.client.build_request("POST", "/predict", content=b'{"delta": "mood", "text": "cat"}')
    assert "content-type" not in request.headers
    assert server.client.send(request).json()["delta"] == "mood"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies(server, encoding):
    plain = b'{"delta": "mood", "text": "cat"}'
    body = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    response = server.client.post("/predict", content=body, headers={"Content-Encoding": encoding})
    assert response.json()["delta"] == "mood"


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


@pytest.mark.parametrize(
    ("accepted", "taken"),
    [
        ("gzip", True),
        ("br, GZIP ;q=0.5", True),
        ("x-gzip", True),
        ("*", True),
        ("*;q=0, gzip", True),
        ("gzip;q=0.001", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("identity;q=1, gzip;q=0", False),
        ("identity, gzip;q=0.5", False),
        ("*, gzip;q=0", False),
        ("gzip;q=x", False),
        ("not-gzip", False),
    ],
)
def test_whether_gzip_is_taken(accepted, taken):
    assert takes_gzip(accepted) is taken


def test_answers_are_compressed_for_callers_that_take_it(pipeline):
    with running(pipeline, gzip_bytes=100) as server:
        for accepted, encoding in (("gzip", "gzip"), ("gzip;q=0", None), ("identity;q=1, gzip;q=0", None)):
            answer = server.client.get("/openapi.json", headers={"Accept-Encoding": accepted})
            assert answer.headers.get("content-encoding") == encoding
            assert answer.headers["vary"] == "Accept-Encoding"
            assert answer.json()["openapi"]
        small = server.client.get("/v2/health/live", headers={"Accept-Encoding": "gzip"})
        assert small.headers.get("content-encoding") is None
