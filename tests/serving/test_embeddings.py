"""What calls may ask of embeddings, in every shape that they come in."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.serving.running import Running, running

PROMPTS = (("query", "who went ? "), ("document", "Ada met . "))
TEXT = "the cat was good"


@pytest.fixture(scope="module")
def pipeline(encoder: Encoder) -> Pipeline:
    ranges = ((-0.5,) * 32, (0.5,) * 32)
    task = TaskSpec("embedding", head="none", pooling="mean", max_length=32, prompts=PROMPTS, ranges=ranges)
    return Pipeline(encoder, [tiny.delta(encoder, "search", [Lora(rank=2)], task, 1)])


@pytest.fixture(scope="module")
def server(pipeline: Pipeline) -> Iterator[Running]:
    with running(pipeline) as started:
        yield started


def infer(**parameters: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}], "parameters": parameters}


ROUTES = {
    "/predict": ({"delta": "search", "text": TEXT}, lambda found: found["embedding"]),
    "/v1/embeddings": ({"model": "search", "input": TEXT}, lambda found: found["data"][0]["embedding"]),
    "/models/search": ({"inputs": TEXT}, lambda found: found),
    "/embed": ({"model": "search", "inputs": TEXT}, lambda found: found[0]),
    "/v1/models/search:predict": ({"instances": [{"text": TEXT}]}, lambda found: found["predictions"][0]["embedding"]),
    "/v2/models/search/infer": (infer(), lambda found: found["outputs"][0]["data"]),
}


def asked(server: Running, route: str, **fields: Any) -> Any:
    """The vector that a route answers where its call says more."""
    body, read = ROUTES[route]
    if route.startswith("/v2"):
        body = infer(**fields)
    elif "instances" in body:
        body = {"instances": [body["instances"][0] | fields]}
    else:
        body = body | fields
    reply = server.post(route, body)
    assert reply.status_code == 200, reply.text
    return read(reply.json())


@pytest.mark.parametrize("route", ROUTES)
def test_the_prompt_of_a_role_is_read_in_every_shape(pipeline, server, route):
    for role, prompt in PROMPTS:
        expected = pipeline(prompt + TEXT, delta="search").answer["embedding"]
        assert asked(server, route, input_type=role) == pytest.approx(expected, abs=1e-6)
    assert asked(server, route) == pytest.approx(pipeline(TEXT, delta="search").answer["embedding"], abs=1e-6)


def test_a_prompt_by_name_as_text_embeddings_inference_has_it(pipeline, server):
    expected = pipeline(PROMPTS[0][1] + TEXT, delta="search").answer["embedding"]
    for route in ("/predict", "/embed", "/models/search", "/v1/embeddings"):
        assert asked(server, route, prompt_name="query") == pytest.approx(expected, abs=1e-6)
        body = ROUTES[route][0] | {"prompt_name": "sts"}
        reply = server.post(route, body)
        assert reply.status_code == 400
        assert "this delta has prompts for document, query" in reply.text
    long = {"model": "search", "inputs": " ".join(["cat"] * 28), "prompt_name": "query"}
    assert server.post("/embed", long).status_code == 413, "the prompt counts"
    assert server.post("/embed", long | {"prompt_name": None}).status_code == 200


def test_rows_of_tokens_are_read_behind_the_prompt_too(pipeline, server):
    body = {"model": "search", "inputs": TEXT, "prompt_name": "query"}
    rows = np.array(server.post("/embed_all", body).json()[0])
    mean = rows.mean(0) / np.linalg.norm(rows.mean(0))
    expected = pipeline(PROMPTS[0][1] + TEXT, delta="search").answer["embedding"]
    assert mean.tolist() == pytest.approx(expected, abs=1e-5)
    for name, value in (("dimensions", 4), ("encoding_format", "int8")):  # of whole texts' vectors
        refused = server.post("/embed_all", body | {name: value})
        assert (refused.status_code, f"option '{name}' is not supported by /embed_all" in refused.text) == (400, True)


def test_ranking_reads_queries_and_documents(pipeline, server):
    body = {"model": "search", "query": "Ada", "documents": ["a dog", "the house"]}
    ranks = {one["index"]: one["relevance_score"] for one in server.post("/v1/rerank", body).json()["results"]}
    for index, text in enumerate(body["documents"]):
        record = {"text": PROMPTS[0][1] + "Ada", "text_pair": PROMPTS[1][1] + text, "input_type": "clustering"}
        assert ranks[index] == pytest.approx(pipeline(record, delta="search").answer["similarity"], abs=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_fewer_dimensions_in_every_shape(pipeline, server, route):
    whole = np.array(pipeline(TEXT, delta="search").answer["embedding"])[:8]
    assert asked(server, route, dimensions=8) == pytest.approx(whole / np.linalg.norm(whole), abs=1e-6)
    body = infer(dimensions=33) if route.startswith("/v2") else ROUTES[route][0] | {"dimensions": 33}
    if "instances" in body:
        body = {"instances": [{"text": TEXT, "dimensions": 33}]}
    reply = server.post(route, body)
    assert reply.status_code == 400
    assert "the embedding has 32" in reply.text


@pytest.mark.parametrize("route", [route for route in ROUTES if not route.startswith("/v2")])
def test_every_encoding_in_every_shape(pipeline, server, route):
    vector = np.array(pipeline(TEXT, delta="search").answer["embedding"], np.float32)
    packed = base64.b64decode(asked(server, route, encoding_format="base64"))
    assert np.frombuffer(packed, "<f4") == pytest.approx(vector, abs=1e-6)
    assert asked(server, route, encoding_format="ubinary") == np.packbits(vector > 0).tolist()
    codes = asked(server, route, encoding_format="int8", dimensions=8)
    expected = np.floor((vector[:8] + 0.5) * 255) - 128
    assert np.abs(np.array(codes) - expected).max() <= 1, "a last bit may be on either side of a step"


def test_cohere_s_shape(pipeline, server):
    texts = [TEXT, "a dog"]
    body = {"model": "search", "texts": texts, "input_type": "search_query", "embedding_types": ["float", "ubinary"]}
    found = server.post("/v2/embed", body).json()
    assert found["texts"] == texts
    assert found["embeddings"].keys() == {"float", "ubinary"}
    for text, row, bits in zip(texts, found["embeddings"]["float"], found["embeddings"]["ubinary"], strict=True):
        expected = pipeline(PROMPTS[0][1] + text, delta="search").answer["embedding"]
        assert row == pytest.approx(expected, abs=1e-6)
        assert bits == np.packbits(np.array(row) > 0).tolist()
    assert found["meta"]["billed_units"]["input_tokens"] > 0
    plain = server.post("/v2/embed", {"model": "search", "texts": texts, "output_dimension": 4}).json()
    assert [len(row) for row in plain["embeddings"]["float"]] == [4, 4]
    for wrong, message in (
        ({"images": ["data:"]}, "field 'images' is not supported"),
        ({"truncate": "START"}, "option 'truncate' is not supported"),
        ({"texts": []}, "expected a text or a list of texts"),
        ({"embedding_types": ["int4"]}, "field 'embedding_types' has 'int4'"),
        ({"model": "base", "embedding_types": ["int8"]}, "this delta has no ranges"),
        ({"input_type": "image"}, "field 'input_type' is 'image'"),
    ):
        reply = server.post("/v2/embed", body | wrong)
        assert reply.status_code == 400
        assert message in reply.text


def test_several_encodings_of_a_pair(pipeline):
    record = {"text": TEXT, "text_pair": "a dog", "embedding_types": ["int8", "float"], "dimensions": 8}
    answer = pipeline(record, delta="search").answer
    assert answer["embeddings"].keys() == answer["embedding_pair"].keys() == {"int8", "float"}
    cosine = np.dot(answer["embeddings"]["float"], answer["embedding_pair"]["float"])
    assert answer["similarity"] == pytest.approx(cosine, abs=1e-6)


def test_chunks_over_the_wire_whole_and_in_parts(encoder, pipeline, server):
    asked = {"delta": "search", "text": TEXT, "pooling": "chunks", "chunks": [[0, 7], [8, len(TEXT)]]}
    found = server.post("/predict", asked).json()["chunks"]
    for one, other in zip(found, pipeline(asked, delta="search").answer["chunks"], strict=True):
        assert (one["start"], one["end"]) == (other["start"], other["end"])
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-6)
    inputs = {name: value for name, value in asked.items() if name != "delta"}
    assert server.post("/models/search", {"inputs": inputs}).json()["chunks"] == found
    assert server.post("/predict", asked | {"chunks": [[0, 99]]}).status_code == 400
    task = TaskSpec("embedding", head="none", pooling="mean", max_length=14, stride=4, long="windows")
    windowed = Pipeline(encoder, [tiny.delta(encoder, "search", [Lora(rank=2)], task, 1)])
    long = {"delta": "search", "text": TEXT * 30, "pooling": "chunks", "chunk_tokens": 7}
    alone = windowed(long, delta="search").answer["chunks"]
    with running(windowed, max_batch_tokens=32) as parted:
        found = parted.post("/predict", long).json()["chunks"]
    assert [one["end"] for one in found] == [one["end"] for one in alone]
    assert found[-1]["embedding"] == pytest.approx(alone[-1]["embedding"], abs=1e-5)


@pytest.mark.usefixtures("hub_session")
def test_real_clients_ask_for_prompts_and_dimensions(pipeline, server):
    from huggingface_hub import InferenceClient
    from tei_client import HttpClient

    asked = pipeline(PROMPTS[0][1] + TEXT, delta="search").answer["embedding"]
    hub = InferenceClient(provider="hf-inference", model=f"{server.url}/models/search", token="none")
    assert hub.feature_extraction(TEXT, prompt_name="query").tolist() == pytest.approx(asked, abs=1e-6)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        more = {"input_type": "query"}
        (one,) = client.embeddings.create(model="search", input=TEXT, dimensions=8, extra_body=more).data
    assert one.embedding == pytest.approx(np.array(asked[:8]) / np.linalg.norm(asked[:8]), abs=1e-6)
    tei = HttpClient(f"{server.url}/tei/search", timeout=120)
    assert tei.embed(TEXT, prompt_name="query")[0] == pytest.approx(asked, abs=1e-6)
    tei.client.close()
