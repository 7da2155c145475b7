"""What each route answers, and what it says to bad calls, over a real socket."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.conftest import DELTAS, RECORDS


def test_one_call_for_all_deltas(server, pipeline):
    items = [{"delta": name, "id": i, **record} for i, (name, record) in enumerate(RECORDS.items())]
    response = server.post("/predict", items)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answers = response.json()
    assert [(answer["id"], answer["delta"]) for answer in answers] == list(enumerate(RECORDS))
    assert {answer["task"] for answer in answers} == {task.kind for _, task in DELTAS.values()}


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
    found = client("labels").zero_shot_classification("the dog", ["a cat", "money", "a dog"])
    assert sorted(one.label for one in found) == ["a cat", "a dog", "money"]
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert sum(one.score for one in found) == pytest.approx(1.0)
    several = client("labels").zero_shot_classification(
        "the dog", ["cat", "dog"], multi_label=True, hypothesis_template="not {}"
    )
    assert {one.label for one in several} == {"cat", "dog"}
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


def test_labels_of_an_open_inference_call(server):
    """Each row has labels of its own, filled up with empty texts."""
    texts = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["the cat", "a dog"]}
    labels = {"name": "labels", "shape": [2, 3], "datatype": "BYTES", "data": ["cat", "dog", "", "a", "b", "c"]}
    reply = server.post("/v2/models/labels/infer", {"inputs": [texts, labels]}).json()
    (output,) = reply["outputs"]
    assert output["name"] == "result_json"
    assert [json.loads(row)["scores"].keys() for row in output["data"]] == [{"cat", "dog"}, {"a", "b", "c"}]
    assert {"name": "labels", "datatype": "BYTES", "shape": [-1, -1]} in server.client.get("/v2/models/labels").json()[
        "inputs"
    ]
