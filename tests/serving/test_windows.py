"""Long texts over every protocol: windows count as rows, and every answer is the pipeline's."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.serving.running import Running, running

WINDOWS: dict[str, Any] = {"max_length": 14, "stride": 4, "long": "windows"}
TASKS = {
    "mood": TaskSpec("classification", ("bad", "good", "so-so"), **WINDOWS),
    "flags": TaskSpec("multi-label", ("film", "food"), **WINDOWS),
    "grade": TaskSpec("regression", **WINDOWS),
    "names": TaskSpec("token-classification", ("O", "B-LOC"), **WINDOWS),
    "sense": TaskSpec("embedding", head="none", pooling="mean", **WINDOWS),
    "short": TaskSpec("embedding", head="none", pooling="mean", max_length=14),
}
TEXT = "the cat was good . Ada met the dog in London . the cat was in the house on the river bank"
ROWS = 22 + 2 * 4 + 3 * 2  # three windows, two overlaps of four tokens, [CLS] and [SEP] of each


@pytest.fixture(scope="module")
def pipeline(encoder: Encoder) -> Pipeline:
    made = (tiny.delta(encoder, name, [Lora(rank=2)], task, 1) for name, task in TASKS.items())
    return Pipeline(encoder, made)


@pytest.fixture(scope="module")
def long(pipeline: Pipeline) -> Iterator[Running]:
    with running(pipeline, max_item_tokens=100) as server:
        yield server


def answer(pipeline: Pipeline, name: str, text: str = TEXT) -> dict[str, Any]:
    (found,) = pipeline.answer([Request(name, {"text": text}, logits=True)])
    return found.as_dict()


@pytest.mark.parametrize("name", ["mood", "flags", "grade", "names", "sense"])
def test_a_long_text_is_answered_whole_and_says_how(pipeline, long, name):
    found = long.post("/predict", {"delta": name, "text": TEXT}).json()
    expected = answer(pipeline, name)
    assert found["windows"] == expected["windows"] == 3
    assert "truncated" not in found
    for field in ("scores", "value", "embedding"):
        assert found.get(field) == pytest.approx(expected.get(field), abs=1e-6)
    assert len(found.get("entities", ())) == len(expected.get("entities", ()))
    short = long.post("/predict", {"delta": name, "text": "the cat"}).json()
    assert "windows" not in short


def test_huggingface_s_shape_has_the_aggregate_s_logits(pipeline, long):
    expected = answer(pipeline, "mood")
    for how, values in (("softmax", expected["scores"].values()), ("none", expected["logits"])):
        body = {"inputs": TEXT, "parameters": {"function_to_apply": how, "top_k": 3}}
        found = {one["label"]: one["score"] for one in long.post("/models/mood", body).json()[0]}
        assert found == pytest.approx(dict(zip(TASKS["mood"].labels, values, strict=True)), abs=1e-6)
    vector = long.post("/models/sense", {"inputs": TEXT, "parameters": {"truncate": False}}).json()
    assert vector == pytest.approx(answer(pipeline, "sense")["embedding"], abs=1e-6)
    assert long.post("/models/short", {"inputs": TEXT, "parameters": {"truncate": False}}).status_code == 400


def test_the_open_inference_protocol_has_the_same(pipeline, long):
    body = {
        "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": [TEXT, "the cat"]}],
        "parameters": {"logits": True},
    }
    found = long.post("/v2/models/mood/infer", body).json()
    outputs = {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in found["outputs"]}
    assert outputs["logits"][0] == pytest.approx(answer(pipeline, "mood")["logits"], abs=1e-6)
    assert "truncated" not in found.get("parameters", {})


def test_embeddings_of_other_protocols_are_the_pipeline_s(pipeline, long):
    expected = answer(pipeline, "sense")["embedding"]
    found = long.post("/v1/embeddings", {"model": "sense", "input": TEXT, "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), "<f4")
    assert vector == pytest.approx(np.array(expected, np.float32), abs=1e-6)
    assert found["usage"]["prompt_tokens"] == ROWS
    assert long.post("/embed", {"model": "sense", "inputs": TEXT}).json()[0] == pytest.approx(expected, abs=1e-6)
    assert long.post("/embed", {"model": "short", "inputs": TEXT}).status_code == 413


def test_a_text_s_windows_count_as_one_item_s_tokens(long):
    reply = long.post("/predict", {"delta": "mood", "text": " ".join([TEXT] * 5)})
    assert reply.status_code == 413
    assert "all windows or choices together; at most 100 are taken" in reply.json()["error"]
