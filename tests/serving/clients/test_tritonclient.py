"""NVIDIA's ``tritonclient[http]``, unmodified, over a real socket; it sends binary tensors unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.clients.triton_options import not_honoured
from tests.serving.conftest import DELTAS, RECORDS
from tests.serving.running import running

ADMIN = "an-admin-key-of-the-tests"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}
TEXTS = ["the cat was good", "Ada met the dög"]


@pytest.fixture(scope="module")
def client(encoder, deltas) -> Iterator[Any]:
    registry = Registry(Pipeline(encoder), deltas)
    for name in DELTAS:
        registry.put(name)
    ring = Keyring([Key("admin", digest_of(ADMIN, ""), admin=True)])
    with running(registry.pipeline, ring, deltas) as server:
        made = triton.InferenceServerClient(server.url.removeprefix("http://"))
        yield made
        made.close()


def tensor(name: str, values: list[str], binary: bool = True) -> Any:
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array([value.encode() for value in values], object), binary_data=binary)
    return made


def infer(client: Any, name: str, *inputs: Any, **options: Any) -> Any:
    return client.infer(name, list(inputs), headers=HEADERS, **options)


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mood", headers=HEADERS)
    assert not client.is_model_ready("moot", headers=HEADERS)
    assert client.get_server_metadata(headers=HEADERS)["extensions"][0] == "binary_tensor_data"
    metadata = client.get_model_metadata("mood", "1", headers=HEADERS)
    assert {one["name"] for one in metadata["inputs"]} == {"text", "text_pair"}


@pytest.mark.parametrize("binary", [True, False])
def test_infer_with_binary_and_json_tensors(client, binary):
    found = infer(client, "mood", tensor("text", TEXTS, binary), request_id="7")
    assert found.get_response()["id"] == "7"
    assert found.get_response()["model_version"] == "1"
    assert set(found.as_numpy("label")) <= {b"bad", b"good", b"so-so"}
    assert found.as_numpy("scores").shape == (2, 3)
    assert found.as_numpy("scores").dtype == np.float32
    wanted = [triton.InferRequestedOutput("logits", binary_data=binary)]
    only = infer(client, "mood", tensor("text", TEXTS), outputs=wanted)
    assert only.as_numpy("logits").shape == (2, 3)
    assert only.as_numpy("label") is None


def test_every_task(client):
    vectors = infer(client, "sense", tensor("text", TEXTS)).as_numpy("embedding")
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-6)
    assert infer(client, "grade", tensor("text", ["a"]), tensor("text_pair", ["b"])).as_numpy("value").shape == (1,)
    record = RECORDS["finder"]
    asked = infer(client, "finder", tensor("question", [record["question"]]), tensor("context", [record["context"]]))
    assert b'"answer"' in asked.as_numpy("result_json")[0]
    choices = triton.InferInput("choices", [1, 2], "BYTES")
    choices.set_data_from_numpy(np.array([[b"the house", b"a river bank"]], object))
    chosen = infer(client, "chooser", tensor("premise", ["the river"]), choices)
    assert chosen.as_numpy("choice").dtype == np.int64


def test_rows_of_several_deltas_in_one_request(client):
    mixed = infer(client, "mood", tensor("text", TEXTS), parameters={"deltas": "mood,names"})
    assert list(mixed.as_numpy("delta")) == [b"mood", b"names"]


def test_what_is_not_honoured_is_refused_by_name(client):
    for inputs, outputs, name in not_honoured(triton, tensor, TEXTS):
        with pytest.raises(InferenceServerException, match=f"{name} is not supported") as refused:
            client.infer("mood", inputs, outputs=outputs, headers=dict(HEADERS))
        assert refused.value.status() == "400"


def test_statistics(client):
    before = client.get_inference_statistics("raw", headers=HEADERS)["model_stats"][0]
    infer(client, "raw", tensor("text", TEXTS))
    (after,) = client.get_inference_statistics("raw", "1", headers=HEADERS)["model_stats"]
    assert (after["name"], after["version"]) == ("raw", "1")
    assert after["inference_count"] - before["inference_count"] == 2
    assert after["execution_count"] - before["execution_count"] == 1
    stats = after["inference_stats"]
    assert stats["success"]["count"] == after["inference_count"]
    assert 0 < stats["compute_infer"]["ns"] <= stats["success"]["ns"] + stats["compute_infer"]["ns"]
    assert after["last_inference"] > 1e12
    names = {one["name"] for one in client.get_inference_statistics(headers=HEADERS)["model_stats"]}
    assert names == {"base", *DELTAS}


def test_the_repository(client):
    client.unload_model("mood", headers=HEADERS)
    assert not client.is_model_ready("mood", headers=HEADERS)
    client.load_model("mood", headers=HEADERS, config='{"version": "1"}')
    states = {one["name"]: one["state"] for one in client.get_model_repository_index(headers=HEADERS)}
    assert states["mood"] == "READY"


def test_the_configuration_says_the_shapes_of_the_metadata(client):
    types: dict[str, str] = {}
    for name in DELTAS:
        config = client.get_model_config(name, "1", headers=HEADERS)
        metadata = client.get_model_metadata(name, headers=HEADERS)
        assert (config["name"], config["platform"], config["max_batch_size"]) == (name, metadata["platform"], 0)
        for which in ("input", "output"):
            assert {one["name"]: one["dims"] for one in config[which]} == {
                one["name"]: one["shape"] for one in metadata[f"{which}s"]
            }
        types |= {one["name"]: one["data_type"] for one in config["output"]}
    assert types["embedding"] == "TYPE_FP32"


def test_what_nvidia_s_examples_of_model_control_do(client):
    """``simple_http_model_control`` step by step, but for a batch size that nobody can set here."""
    client.load_model("sense", headers=HEADERS)
    assert client.is_model_ready("sense", headers=HEADERS)
    with pytest.raises(InferenceServerException, match=r"failed to load: .*not JSON, or no object"):
        client.load_model("sense", headers=HEADERS, config='"parameters": {"config": {{"max_batch_size": "16"}}}')
    with pytest.raises(
        InferenceServerException, match=r"failed to load: .*'max_batch_size', which a call cannot change"
    ):
        client.load_model("sense", headers=HEADERS, config='{"max_batch_size":"16"}')
    client.unload_model("sense", headers=HEADERS)
    assert not client.is_model_ready("sense", headers=HEADERS)
    with pytest.raises(InferenceServerException, match="failed to load 'wrong_model_name'"):
        client.load_model("wrong_model_name", headers=HEADERS)
    client.load_model("sense", headers=HEADERS)


def test_errors(client):
    with pytest.raises(InferenceServerException, match="no delta 'moot'"):
        infer(client, "moot", tensor("text", TEXTS))
    with pytest.raises(InferenceServerException, match="unknown input 'txt'"):
        infer(client, "mood", tensor("txt", TEXTS))
    with pytest.raises(InferenceServerException, match="no valid API key"):
        client.infer("mood", [tensor("text", TEXTS)])
    with pytest.raises(InferenceServerException, match="no answer within"):
        infer(client, "mood", tensor("text", TEXTS), timeout=1)


def test_what_kserve_s_client_sends(client, server):
    """kserve 0.21's ``InferenceRESTClient`` adds ``model_name`` to the body; unknown keys are ignored."""
    body = {
        "model_name": "mood",
        "id": "a",
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the cat"], "parameters": {"x": 1}}],
    }
    answer = server.post("/v2/models/mood/infer", body).json()
    assert answer["model_name"] == "mood"
    assert answer["outputs"][0]["name"] == "label"
