"""NVIDIA's ``tritonclient[grpc]``, unmodified, beside our own messages in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import Expired, Overloaded
from bertology_serve.serving.keys import Key, Keyring, digest_of
from bertology_serve.serving.versions.delta_registry import Registry
from tests.serving.clients.triton_options import not_honoured
from tests.serving.conftest import DELTAS
from tests.serving.running import Running, running

ADMIN, USER = "an-admin-key-of-the-tests", "a-user-key-of-the-tests"
HEADERS = {"authorization": f"Bearer {ADMIN}"}
TEXTS = ["the cat was good", "Ada met the dög"]


@pytest.fixture(scope="module")
def served(encoder, deltas) -> Iterator[Running]:
    registry = Registry(Pipeline(encoder), deltas)
    for name in DELTAS:
        registry.put(name)
    keys = [Key("admin", digest_of(ADMIN, ""), admin=True), Key("user", digest_of(USER, ""), deltas=("sense",))]
    with running(registry.pipeline, Keyring(keys), deltas, grpc_port=0) as server:
        yield server


@pytest.fixture(scope="module")
def client(served) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{served.server.rpc.port}") as made:
        yield made


def tensor(name: str, values: list[str]) -> Any:
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array([value.encode() for value in values], object))
    return made


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mood", headers=HEADERS)
    assert client.get_server_metadata(headers=HEADERS).name == "bertology-serve"
    metadata = client.get_model_metadata("mood", headers=HEADERS)
    assert list(metadata.versions) == ["1"]
    assert {one.name: list(one.shape) for one in metadata.outputs}["scores"] == [-1, 3]


def test_infer(client, served):
    found = client.infer("mood", [tensor("text", TEXTS)], request_id="7", headers=HEADERS)
    response = found.get_response()
    assert (response.id, response.model_name, response.model_version) == ("7", "mood", "1")
    scores = found.as_numpy("scores")
    body = [{"delta": "mood", "text": text} for text in TEXTS]
    over_http = served.client.post("/predict", json=body, headers=HEADERS).json()
    assert scores[1] == pytest.approx(list(over_http[1]["scores"].values()), abs=1e-5)
    wanted = [triton.InferRequestedOutput("logits")]
    only = client.infer("mood", [tensor("text", TEXTS)], "1", outputs=wanted, headers=HEADERS)
    assert only.as_numpy("logits").shape == (2, 3)
    mixed = client.infer("mood", [tensor("text", TEXTS)], parameters={"deltas": "mood,names"}, headers=HEADERS)
    assert list(mixed.as_numpy("delta")) == [b"mood", b"names"]


def test_what_is_not_honoured_is_refused_by_name(client):
    for inputs, outputs, name in not_honoured(triton, tensor, TEXTS):
        with pytest.raises(InferenceServerException, match=f"{name} is not supported") as refused:
            client.infer("mood", inputs, outputs=outputs, headers=dict(HEADERS))
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_typed_contents_as_other_clients_send_them(served):
    import grpc

    from bertology_serve.serving.protocol.grpc_messages import SERVICE, message

    request = message("ModelInferRequest")(model_name="sense")
    request.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"the cat")
    with grpc.insecure_channel(f"127.0.0.1:{served.server.rpc.port}") as channel:
        infer = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            message("ModelInferRequest").SerializeToString,
            message("ModelInferResponse").FromString,
        )
        answer = infer(request, metadata=(("x-api-key", USER),), timeout=120)
        assert np.linalg.norm(np.frombuffer(answer.raw_output_contents[0], "<f4")) == pytest.approx(1, abs=1e-6)
        request.inputs[0].contents.bytes_contents[0] = b"\xff"
        with pytest.raises(grpc.RpcError, match="not UTF-8"):
            infer(request, metadata=(("x-api-key", USER),), timeout=120)
        request.inputs[0].contents.bytes_contents[0] = b"typed"
        request.raw_input_contents.append(b"\x03\x00\x00\x00raw")
        with pytest.raises(grpc.RpcError, match="send one of them"):
            infer(request, metadata=(("x-api-key", USER),), timeout=120)
        request.raw_input_contents.append(b"")
        with pytest.raises(grpc.RpcError, match="2 entries for 1 inputs"):
            infer(request, metadata=(("x-api-key", USER),), timeout=120)


def test_a_call_keeps_its_id_or_gets_one(served):
    import grpc

    from bertology_serve.serving.protocol.grpc_messages import SERVICE, message

    def ids(method: str, **fields: str) -> list[str]:
        kind = message(f"{method}Request")
        ask = channel.unary_unary(
            f"/{SERVICE}/{method}", kind.SerializeToString, message(f"{method}Response").FromString
        )
        found = []
        for sent in ("mine-7", "not sane", ""):
            metadata = [("x-api-key", USER), *([("x-request-id", sent)] if sent else [])]
            try:
                _, call = ask.with_call(kind(**fields), metadata=metadata, timeout=120)
            except grpc.RpcError as problem:
                call = problem
            found.append(dict(call.trailing_metadata())["x-request-id"])
        return found

    with grpc.insecure_channel(f"127.0.0.1:{served.server.rpc.port}") as channel:
        for own, *made in (ids("ModelMetadata", name="sense"), ids("ModelMetadata", name="mood"), ids("ServerLive")):
            assert own == "mine-7"
            assert len(set(made)) == 2
            assert all(len(one) == 32 for one in made)


def test_statistics_and_the_repository(client):
    client.infer("raw", [tensor("text", TEXTS)], headers=HEADERS)
    (stats,) = client.get_inference_statistics("raw", headers=HEADERS).model_stats
    assert stats.inference_count == stats.inference_stats.success.count >= 2
    assert len(client.get_inference_statistics(headers=HEADERS).model_stats) == len(DELTAS) + 1
    client.unload_model("grade", headers=HEADERS)
    assert not client.is_model_ready("grade", headers=HEADERS)
    client.load_model("grade", config='{"version": "1"}', headers=HEADERS)
    index = {one.name: one.state for one in client.get_model_repository_index(headers=HEADERS).models}
    assert index["grade"] == "READY"
    with pytest.raises(InferenceServerException, match="files are not taken"):
        client.load_model("grade", config="{}", files={"file:1/delta.json": b"{}"}, headers=HEADERS)


def test_the_configuration(client):
    config = client.get_model_config("names", headers=HEADERS).config
    assert (config.name, config.platform, config.max_batch_size) == ("names", "bertology_packed", 0)
    assert [(one.name, one.data_type, list(one.dims), one.optional) for one in config.input] == [
        ("text", model_config_pb2.TYPE_STRING, [-1], True),
        ("tokens", model_config_pb2.TYPE_STRING, [-1, -1], True),
    ]
    assert config.parameters["task"].string_value == "token-classification"
    scores = {one.name: one for one in client.get_model_config("mood", headers=HEADERS).config.output}["scores"]
    assert (scores.data_type, list(scores.dims)) == (model_config_pb2.TYPE_FP32, [-1, 3])


def test_what_nvidia_s_examples_of_model_control_do(client):
    """``simple_grpc_model_control`` step by step, but for a batch size that nobody can set here."""
    client.load_model("sense", headers=HEADERS)
    assert client.is_model_ready("sense", headers=HEADERS)
    for config in ('"parameters": {"config": {{"max_batch_size": "16"}}}', '{"max_batch_size":"16"}'):
        with pytest.raises(InferenceServerException, match="failed to load"):
            client.load_model("sense", headers=HEADERS, config=config)
    client.unload_model("sense", headers=HEADERS)
    assert not client.is_model_ready("sense", headers=HEADERS)
    with pytest.raises(InferenceServerException, match="files are not taken"):
        client.load_model("sense", headers=HEADERS, config="{}", files={"file:" + "A" * 256: b"a"})
    assert client.is_server_live()
    with pytest.raises(InferenceServerException, match="failed to load 'wrong_model_name'"):
        client.load_model("wrong_model_name", headers=HEADERS)
    client.load_model("sense", headers=HEADERS)


@pytest.mark.parametrize(
    ("name", "inputs", "headers", "options", "status", "text"),
    [
        ("moot", ["text"], HEADERS, {}, "NOT_FOUND", "no delta 'moot'"),
        ("mood", ["txt"], HEADERS, {}, "INVALID_ARGUMENT", "unknown input 'txt'"),
        ("mood", ["text"], {}, {}, "UNAUTHENTICATED", "no valid API key"),
        ("mood", ["text"], {"x-api-key": USER}, {}, "PERMISSION_DENIED", "does not open delta 'mood'"),
        ("mood", ["text"], HEADERS, {"timeout": 1}, "DEADLINE_EXCEEDED", "no answer within"),
    ],
)
def test_errors(client, name, inputs, headers, options, status, text):
    with pytest.raises(InferenceServerException, match=text) as told:
        client.infer(name, [tensor(inputs[0], TEXTS)], headers=headers, **options)
    assert told.value.status() == f"StatusCode.{status}"


@pytest.mark.parametrize(
    ("problem", "status", "text"),
    [
        (Overloaded("full", 3), "UNAVAILABLE", "full"),
        (Expired("late"), "DEADLINE_EXCEEDED", "late"),
        (RuntimeError("SECRET"), "INTERNAL", "the fault is in its log"),
    ],
)
def test_faults_and_overload(client, served, monkeypatch, problem, status, text):
    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise problem

    monkeypatch.setattr(served.server.service, "answer", fail)
    with pytest.raises(InferenceServerException, match=text) as told:
        client.infer("mood", [tensor("text", TEXTS)], headers=HEADERS)
    assert told.value.status() == f"StatusCode.{status}"
