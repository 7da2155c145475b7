"""Long texts over every protocol: windows count as rows, and every answer is the pipeline's."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.kinds.lora import Lora
from bertology_serve.serving.batching.scheduler import CallContext
from bertology_serve.serving.service import Service
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.serving.held import Held
from tests.serving.running import Running, running
from tests.serving.test_service import with_service

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


@pytest.mark.parametrize("name", TASKS)
def test_windows_of_one_text_run_in_many_batches_and_make_one_answer(pipeline, name):
    """No batch is larger than it may be, others are served meanwhile, and the item counts as one."""
    held = Held(pipeline)
    whole = Request(name, {"text": " ".join([TEXT] * 4)}, logits=True)
    short = Request("flags" if name == "mood" else "mood", {"text": "the cat"})
    costs = list[int]()
    held.run = lambda jobs: (costs.append(sum(job.cost for job in jobs)), Held.run(held, jobs))[1]  # type: ignore[method-assign]

    async def use(service: Service) -> Any:
        first = asyncio.ensure_future(service.answer(CallContext(), [short]))
        await asyncio.to_thread(held.busy.wait, 20)
        calls = [asyncio.ensure_future(service.answer(CallContext(), [one])) for one in (whole, short)]
        await asyncio.sleep(0.01)
        waits = service.queue.items
        held.go.set()
        await first
        return waits, [found for call in calls for found in await call]

    (waits, (found, _)), metrics = with_service(held, use, max_batch_tokens=32)
    (expected,) = pipeline.answer([whole])
    one, other = found.as_dict(), expected.as_dict()
    assert one.keys() == other.keys()
    assert one.get("windows") == other.get("windows")
    assert one.get("truncated") == other.get("truncated")
    flat = [np.concatenate([np.ravel(part) for part in answer["logits"]]) for answer in (one, other)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5)
    if expected.windows > 1:
        assert waits == 1 + -(-expected.windows // 2), "two windows a part"
        assert max(costs) <= 32
        assert "the cat" in held.texts[1:4], "it does not wait for all windows"
    assert f'bertology_items_total{{delta="{name}",outcome="answered"}} 1.0' in metrics
    cost = float(metrics.split(f'bertology_tokens_total{{delta="{name}"}} ')[1].split()[0])
    assert cost == expected.tokens_read


def test_a_text_one_of_whose_windows_fails_has_no_answer(pipeline, monkeypatch):
    real, runs = pipeline.run, list[int]()

    def failing(jobs: Any) -> Any:
        runs.append(len(jobs))
        if len(runs) == 2:
            raise ValueError("a fault")
        return real(jobs)

    monkeypatch.setattr(pipeline, "run", failing)

    async def use(service: Service) -> Any:
        with pytest.raises(ValueError, match="a fault"):
            await service.answer(CallContext(), [Request("mood", {"text": " ".join([TEXT] * 4)})])

    _, metrics = with_service(pipeline, use, max_batch_tokens=32)
    assert 'bertology_items_total{delta="mood",outcome="failed"} 1.0' in metrics
