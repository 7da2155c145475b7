"""Whatever is sent, the answer is a documented one, never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bertology_serve.serving.http.openapi import document
from tests.serving.conftest import DELTAS, RECORDS
from tests.serving.running import Running

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEWER = settings(FAST, max_examples=40)
NAMES = st.sampled_from([*DELTAS, "base", "moot", ""])
FIELDS = sorted({field for record in RECORDS.values() for field in record} | {"top_k", "id", "logits", "label"})
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)
RECORD = st.dictionaries(
    st.sampled_from(FIELDS), VALUES | st.sampled_from(["the cat", "Ada went to Paris"]), max_size=5
)
ITEM = st.builds(lambda name, record: {"delta": name, **record}, NAMES, RECORD)
OPTIONS = ["top_k", "function_to_apply", "aggregation_strategy", "ignore_labels", "normalize", "dimensions", "truncate"]
TENSOR = st.fixed_dictionaries(
    {"name": st.sampled_from(["text", "text_pair", "tokens", "choices", "delta", "x"]) | VALUES},
    optional={
        "shape": st.lists(st.integers(-1, 3), max_size=3) | VALUES,
        "datatype": st.sampled_from(["BYTES", "FP32"]) | VALUES,
        "data": st.lists(st.text(max_size=5) | VALUES, max_size=4),
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "x"]), VALUES, max_size=2),
    },
)
INFER = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3) | VALUES},
    optional={
        "id": VALUES,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["label", "logits", "x"]) | VALUES})),
        "parameters": st.dictionaries(st.sampled_from(["deltas", "logits", "binary_data_output"]), VALUES),
    },
)


BESIDE: dict[str, st.SearchStrategy[Any]] = {
    "redact": st.booleans()
    | st.dictionaries(st.sampled_from(["PER", "LOC", "*", "x"]), st.sampled_from(["mask", "x"])),
    "patterns": st.booleans() | st.lists(st.sampled_from(["EMAIL", "IP", "x"])),
    "offsets": st.just("utf16"),
    "input_type": st.sampled_from(["query", "document", "x"]),
    "prompt_name": st.text(),
    "dimensions": st.integers(0, 40),
    "normalize": st.booleans(),
    "encoding_format": st.sampled_from(["base64", "int8", "binary", "x"]),
    "embedding_types": st.lists(st.sampled_from(["float", "ubinary", "x"])),
    "pooling": st.just("chunks"),
    "chunks": st.lists(st.lists(st.integers(-1, 20), max_size=3), max_size=3),
    "chunk_tokens": st.integers(-1, 5),
}


def check(server: Running, path: str, template: str, body: Any, **headers: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    response = server.client.post(path, content=content, headers=headers)
    documented = document()["paths"][template]["post"]["responses"]
    assert str(response.status_code) in documented, response.text
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json().keys() == {"error"}
        error = response.json()["error"]
        error = error["message"] if path.startswith("/v1/") and not path.endswith(":predict") else error
        assert "\n" not in error
        assert len(error) < 1000


@FAST
@given(ITEM | st.lists(ITEM, max_size=3) | VALUES)
@example({"delta": "mood", "text": "\ud800"})
@example({"delta": "chooser", "premise": "a", "choices": ["b"] * 65})
@example({"delta": "names", "tokens": ["", " ", "\u200b"]})
@example({"delta": "names", "text": "\u0000"})
@example({"delta": "finder", "question": "\u200b", "context": "\u200b"})
@example({"delta": "mood", "text": "\u200b"})
def test_predict(server, body):
    check(server, "/predict", "/predict", body)


@FAST
@given(
    st.sampled_from(["names", "finder", "sense", "raw", "base", "mood"]),
    st.sampled_from(["Ada met bob@x.org", "\U0001f600 \u0301", "\u200b"]),
    st.fixed_dictionaries({}, optional={name: values | VALUES for name, values in BESIDE.items()}),
)
@example("base", "\u200b", {"pooling": "chunks", "chunk_tokens": 1})
def test_what_may_stand_beside_a_text(server, name, text, fields):
    record = {"question": "who", "context": text} if name == "finder" else {"text": text}
    check(server, "/predict", "/predict", {"delta": name, **record, **fields})
    check(server, f"/models/{name}", "/models/{delta}", {"inputs": {**record, **fields}, "parameters": {}})
    check(server, f"/models/{name}", "/models/{delta}", {"inputs": record, "parameters": fields})


@FAST
@given(
    NAMES.filter(bool),
    st.fixed_dictionaries({"inputs": RECORD | st.lists(RECORD | VALUES, max_size=3) | st.text()}),
    st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=3) | VALUES,
)
def test_task(server, name, body, parameters):
    check(server, f"/models/{name}", "/models/{delta}", {**body, "parameters": parameters})


@FAST
@given(NAMES.filter(bool), INFER | VALUES, st.binary(max_size=20), st.none() | st.text("0123456789-x", max_size=4))
def test_infer(server, name, body, tail, length):
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    headers = {} if length is None else {"Inference-Header-Content-Length": length or str(len(content))}
    check(
        server, f"/v2/models/{name}/infer", "/v2/models/{delta}/infer", content + tail * (length is not None), **headers
    )


@FAST
@given(
    st.fixed_dictionaries(
        {"model": st.sampled_from(["sense", "raw", "base", "mood", "x"]) | VALUES, "input": VALUES | st.just("a cat")},
        optional={"encoding_format": st.sampled_from(["float", "base64"]) | VALUES, "dimensions": VALUES},
    )
    | VALUES
)
def test_embeddings(server, body):
    check(server, "/v1/embeddings", "/v1/embeddings", body)


@FAST
@given(st.sampled_from(["/predict", "/models/mood", "/v2/models/mood/infer"]), st.binary())
@example("/predict", b"[" * 100_000)
@example("/predict", b'{"a":' * 50_000)
@example("/models/mood", b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}")
@example(
    "/v2/models/mood/infer",
    b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":' + b"[" * 900 + b"]" * 900 + b"}]}",
)
def test_any_bytes(server, path, body):
    check(server, path, path.replace("mood", "{delta}"), body)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"]), st.lists(st.text(min_size=1), max_size=4))
def test_any_path_and_method(server, method, parts):
    from urllib.parse import quote

    path = "/" + "/".join(quote(part.encode("utf-8", "surrogatepass"), safe="") for part in parts)
    assert server.client.request(method, path).status_code in (200, 404, 405)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/score", "/classify", "/v1/embeddings", "/v2/embed"])
@FEWER
@given(
    st.fixed_dictionaries(
        {"model": NAMES | VALUES},
        optional={
            name: VALUES | st.lists(st.text() | VALUES, max_size=3) | st.text()
            for name in ("query", "documents", "top_n", "return_documents", "text_1", "text_2", "input", "items",
                         "texts", "use_activation", "truncate_prompt_tokens", "max_tokens_per_doc", "rank_fields",
                         "input_type", "embedding_types", "output_dimension")
        },
    )
)  # fmt: skip
@example({"model": "grade", "query": "\ud800", "documents": ["\ud800"], "return_documents": True})
@example({"model": "\ud800", "query": "a", "documents": ["b"]})
def test_bodies_that_name_their_model(server, path, body):
    check(server, path, path, body)


@FEWER
@given(NAMES.filter(bool), st.fixed_dictionaries({"instances": st.lists(RECORD | VALUES | st.text(), max_size=3)}))
@example("mood", {"instances": ["\ud800"]})
def test_predict_v1(server, name, body):
    check(server, f"/v1/models/{name}:predict", "/v1/models/{delta}:predict", body)
