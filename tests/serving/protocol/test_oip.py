from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import DataError, LimitError, NotFound, Unsupported
from bertology_serve.serving.protocol.oip import InferCall, read_infer, write_infer
from bertology_serve.serving.versions.delta_registry import Registry


def read(registry: Registry, model: str, body: Any, length: int | None = None) -> InferCall:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_infer(raw, length, registry.find(model), registry.find, 100)


def infer(registry: Registry, model: str, body: Any) -> dict[str, Any]:
    """The response's JSON, outputs by name."""
    call = read(registry, model, body)
    pipeline: Pipeline = registry.pipeline
    content, length = write_infer(call, pipeline.run([pipeline.prepare(request) for request in call.requests]))
    assert length is None
    response = json.loads(content)
    return response | {"outputs": {output["name"]: output for output in response["outputs"]}}


def texts(name: str, *rows: Any) -> dict[str, Any]:
    width = [len(rows[0])] if isinstance(rows[0], list) else []
    return {"name": name, "shape": [len(rows), *width], "datatype": "BYTES", "data": list(rows)}


def test_classification(registry):
    found = infer(registry, "mood", {"id": "7", "inputs": [texts("text", "the cat", "a dog")], "model_name": "ignored"})
    assert (found["model_name"], found["model_version"], found["id"]) == ("mood", "1", "7")
    outputs = found["outputs"]
    assert list(outputs) == ["label", "score", "scores"]
    assert outputs["scores"]["shape"] == [2, 3]
    scores = np.reshape(outputs["scores"]["data"], (2, 3))
    assert scores.sum(1) == pytest.approx([1, 1])
    labels = ["bad", "good", "so-so"]
    assert [labels[i] for i in scores.argmax(1)] == outputs["label"]["data"]
    assert outputs["score"]["data"] == pytest.approx(scores.max(1))


def test_logits_are_given_when_asked_for(registry):
    body = {"inputs": [texts("text", "the cat")]}
    by_parameter = infer(registry, "mood", {**body, "parameters": {"logits": True}})["outputs"]
    assert list(by_parameter) == ["label", "score", "scores", "logits"]
    by_name = infer(registry, "mood", {**body, "outputs": [{"name": "logits"}]})["outputs"]
    assert by_name["logits"] == by_parameter["logits"]
    assert by_name["logits"]["shape"] == [1, 3]
    assert infer(registry, "grade", {**body, "outputs": [{"name": "logits"}, {"name": "value"}]})["outputs"]["logits"][
        "data"
    ] == pytest.approx(infer(registry, "grade", body)["outputs"]["value"]["data"])


CHOICE = {"choice": ("INT64", [1]), "score": ("FP32", [1])}


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("grade", [texts("text", "the cat")], {"value": ("FP32", [1])}),
        ("sense", [texts("text", "the cat", "a dog")], {"embedding": ("FP32", [2, 32])}),
        ("chooser", [texts("premise", "the river"), texts("choices", ["cold", "red", ""])], CHOICE),
        ("chooser", [texts("text", "the river"), texts("text_pair", ["cold", "red"])], CHOICE),
        ("names", [texts("tokens", ["Ada", "went"])], {"result_json": ("BYTES", [1])}),
        ("names", [texts("text", "Ada went")], {"result_json": ("BYTES", [1])}),
        ("finder", [texts("question", "who"), texts("context", "Ada went")], {"result_json": ("BYTES", [1])}),
        ("finder", [texts("text", "who"), texts("text_pair", "Ada went")], {"result_json": ("BYTES", [1])}),
    ],
)  # fmt: skip
def test_every_task_has_its_tensors(registry, model, inputs, outputs):
    found = infer(registry, model, {"inputs": inputs})["outputs"]
    assert {name: (output["datatype"], output["shape"]) for name, output in found.items()} == outputs


def test_words_and_vectors_of_texts_are_filled_up_to_the_longest(registry):
    """Weights with index -1 and value 0, vectors with zeros; how many there are is told."""
    names = ["the great film", "cat"]
    answers = [registry.pipeline({"text": name}, "words").answer["sparse"] for name in names]
    found = infer(registry, "words", {"inputs": [texts("text", *names)]})["outputs"]
    most = max(map(len, answers))
    index, value = (np.reshape(found[name]["data"], (2, most)) for name in ("index", "value"))
    assert {name: (one["datatype"], one["shape"]) for name, one in found.items()} == {
        "index": ("INT64", [2, most]),
        "value": ("FP32", [2, most]),
    }
    for row, answer in enumerate(answers):
        assert index[row].tolist() == [one["index"] for one in answer] + [-1] * (most - len(answer))
        assert value[row] == pytest.approx([one["value"] for one in answer] + [0.0] * (most - len(answer)), abs=1e-5)
    found = infer(registry, "late", {"inputs": [texts("text", *names)]})["outputs"]
    assert {name: (one["datatype"], one["shape"]) for name, one in found.items()} == {
        "vectors": ("FP32", [2, 5, 8]),
        "vector_count": ("INT64", [2]),
    }
    assert found["vector_count"]["data"] == [5, 3]
    rows = np.reshape(found["vectors"]["data"], (2, 5, 8))
    assert np.linalg.norm(rows, axis=2) == pytest.approx(np.array([[1] * 5, [1, 1, 1, 0, 0]]), abs=1e-6)


@pytest.mark.parametrize("named", [["mood", "finder", ""], "mood, finder,"])
def test_rows_may_name_their_deltas(registry, named):
    body = {
        "parameters": {"deltas": named},
        "inputs": [texts("text", "the cat", "who", "a dog"), texts("text_pair", "", "Ada went", "")],
    }
    outputs = infer(registry, "grade", body)["outputs"]
    assert outputs["delta"]["data"] == ["mood", "finder", "grade"]
    assert outputs["version"]["data"] == ["1", "1", "1"]
    answers = [json.loads(text) for text in outputs["result_json"]["data"]]
    assert ["label" in answers[0], "answer" in answers[1], "value" in answers[2]] == [True] * 3


def test_or_name_them_in_a_tensor(registry):
    body = {
        "inputs": [texts("text", "the cat", "a dog"), texts("delta", "sense", "raw")],
        "outputs": [{"name": "embedding"}],
    }
    assert infer(registry, "mood", body)["outputs"]["embedding"]["shape"] == [2, 32]
    assert "model_version" not in infer(registry, "mood", body)


def test_binary_in_and_out(registry):
    raw = b"".join(struct.pack("<I", len(text)) + text for text in (b"the cat", b"a dog"))
    head = json.dumps(
        {
            "inputs": [
                {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
            ],
            "parameters": {"binary_data_output": True},
            "outputs": [{"name": "score"}, {"name": "label", "parameters": {"binary_data": False}}],
        }
    ).encode()
    call = read(registry, "mood", head + raw, len(head))
    pipeline = registry.pipeline
    content, length = write_infer(call, pipeline.run([pipeline.prepare(request) for request in call.requests]))
    assert length is not None
    score, label = json.loads(content[:length])["outputs"]
    assert score["parameters"] == {"binary_data_size": 8}
    assert "data" not in score
    plain = infer(registry, "mood", {"inputs": [texts("text", "the cat", "a dog")]})["outputs"]
    assert np.frombuffer(content[length:], "<f4") == pytest.approx(plain["score"]["data"], abs=1e-6)
    assert label["data"] == plain["label"]["data"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "there are no inputs"),
        ({"inputs": [texts("tekst", "a")]}, "unknown input 'tekst'; did you mean 'text'?"),
        ({"inputs": [texts("text", "a"), texts("text", "a")]}, "input 'text' is given twice"),
        ({"inputs": [texts("text", "a"), texts("text_pair", "a", "b")]}, "inputs differ in rows: text 1, text_pair 2"),
        ({"inputs": [texts("text", "a")], "parameters": {"deltas": 7}}, "parameter 'deltas' is no list of names"),
        ({"inputs": [texts("text", "a", "b")], "parameters": {"deltas": ["a"]}}, "names 1 deltas for 2 rows"),
        ({"inputs": [texts("text", "a")], "parameters": {"logits": 1}}, "parameter 'logits' is a number"),
        ({"inputs": [texts("text", "a")], "outputs": [{"name": "value"}]}, "output 'value' is not given by the deltas"),
        ({"inputs": [texts("text", "a")], "parameters": []}, "wrong shape"),
        ({"inputs": [texts("text", "a", "b")], "parameters": {"deltas": "mood,grade"}, "outputs": [{"name": "logits"}]},
         "output 'logits' is not given by the deltas of all rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(registry, body, message):
    with pytest.raises(DataError) as problem:
        read(registry, "mood", body)
    assert message in str(problem.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("classification", "ask for the outputs label and scores"),
        ("shared_memory_region", "no shared memory is offered"),
    ],
)
def test_parameters_of_a_tensor_that_are_not_honoured_are_refused(registry, name, advice):
    one, output = texts("text", "the cat"), {"name": "scores", "parameters": {name: 1}}
    with pytest.raises(Unsupported, match=f"output 'scores': parameter '{name}' is not supported; {advice}"):
        read(registry, "mood", {"inputs": [one], "outputs": [output]})
    empty = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {name: 1}}
    with pytest.raises(Unsupported, match=f"input 'text': parameter '{name}' is not supported; {advice}"):
        read(registry, "mood", {"inputs": [empty]})
    output["parameters"] = {name: 0, "binary_data": False}
    assert list(infer(registry, "mood", {"inputs": [one], "outputs": [output]})["outputs"]) == ["scores"]


@pytest.mark.parametrize("name", ["redact", "patterns", "encoding_format", "pooling", "prompt_name", "multi_label"])
def test_options_of_other_routes_are_refused(registry, name):
    """Nothing that was to be redacted goes back as it is."""
    with pytest.raises(Unsupported, match=f"parameter '{name}' is not supported under /v2"):
        read(registry, "names", {"inputs": [texts("text", "Ada")], "parameters": {name: "mask"}})
    assert read(registry, "names", {"inputs": [texts("text", "Ada")], "parameters": {name: False}}).requests


def test_several_deltas_for_one_row(registry):
    found = infer(
        registry, "mood", {"inputs": [texts("text", "the cat")], "parameters": {"deltas": "mood,grade,names"}}
    )
    outputs = found["outputs"]
    assert outputs["delta"]["data"] == ["mood", "grade", "names"]
    alone = [infer(registry, name, {"inputs": [texts("text", "the cat")], "outputs": [{"name": "result_json"}]})
             for name in ("mood", "grade", "names")]  # fmt: skip
    for ours, one in zip(outputs["result_json"]["data"], alone, strict=True):
        expected = json.loads(one["outputs"]["result_json"]["data"][0])
        assert json.loads(ours).keys() == expected.keys()
        assert json.loads(ours)["delta"] == expected["delta"]
    many = {"inputs": [texts("text", "a")], "parameters": {"deltas": ["mood"] * 101}}
    with pytest.raises(DataError, match="names 101 deltas for 1 rows"):
        read(registry, "mood", many)


def test_unknown_deltas_of_rows_and_too_many_rows(registry):
    with pytest.raises(NotFound, match="no delta 'nope'"):
        read(registry, "mood", {"inputs": [texts("text", "a")], "parameters": {"deltas": "nope"}})
    with pytest.raises(LimitError, match="at most 100 rows"):
        read(registry, "mood", {"inputs": [texts("text", *["a"] * 101)]})


@pytest.mark.parametrize("length", [-1, 10_000])
def test_the_json_length_must_lie_within_the_body(registry, length):
    with pytest.raises(DataError, match="the body has"):
        read(registry, "mood", {"inputs": [texts("text", "a")]}, length)


def test_no_rows_are_no_requests(registry):
    assert (
        read(registry, "mood", {"inputs": [{"name": "text", "shape": [0], "datatype": "BYTES", "data": []}]}).requests
        == []
    )


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("mood", [texts("text", ["a", "b"])], "row 0: input 'text' holds 2 texts; expected one: shape [n] for n items"),
        ("mood", [texts("text", ["a", ""], ["b", "c"])], "row 1: input 'text' holds 2 texts"),
        ("mood", [texts("text", "a"), texts("text_pair", ["b", "c"])], "input 'text_pair' holds 2 texts"),
        ("sense", [texts("text", ["a", "b"])], "input 'text' holds 2 texts"),
        ("finder", [texts("question", "a"), texts("context", ["b", "c"])], "input 'context' holds 2 texts"),
        ("chooser", [texts("premise", ["a", "b"]), texts("choices", ["b", "c"])], "input 'premise' holds 2 texts"),
        ("mood", [texts("text", "a"), texts("delta", ["mood", "grade"])], "input 'delta' holds 2 texts"),
        ("mood", [texts("text", "a"), texts("question", "b")], "reads no input 'question'; expected text, text_pair"),
        ("grade", [texts("text", "a"), texts("tokens", ["b", "c"])], "regression reads no input 'tokens'"),
        ("names", [texts("text", "a"), texts("text_pair", "b")], "reads no input 'text_pair'; expected text, tokens"),
        ("names", [texts("tokens", ["a", "b"]), texts("text", "a b")], "input 'text' repeats what another input says"),
        ("finder", [texts("text", "a"), texts("question", "b")], "input 'question' repeats what another input says"),
        ("chooser", [texts("premise", "a"), texts("choices", ["b"]), texts("text_pair", ["c"])], "'text_pair' repeats"),
    ],
)  # fmt: skip
def test_nothing_that_was_sent_is_dropped(registry, model, inputs, message):
    with pytest.raises(DataError) as problem:
        read(registry, model, {"inputs": inputs})
    assert message in str(problem.value)


def test_shapes_that_hold_one_text_a_row_mean_the_same(registry):
    flat = infer(registry, "mood", {"inputs": [texts("text", "the cat", "a dog")]})["outputs"]
    for rows in ([["the cat"], ["a dog"]], [["the cat", ""], ["a dog", ""]]):
        assert infer(registry, "mood", {"inputs": [texts("text", *rows)]})["outputs"] == flat


def test_rows_of_several_tasks_leave_empty_what_they_do_not_read(registry):
    body = {
        "parameters": {"deltas": "mood,names,names"},
        "inputs": [texts("text", "the cat", "Ada went", ""), texts("tokens", ["", ""], ["", ""], ["Ada", "went"])],
    }
    answers = [json.loads(text) for text in infer(registry, "mood", body)["outputs"]["result_json"]["data"]]
    assert "label" in answers[0]
    assert "tags" not in answers[1]
    assert len(answers[2]["tags"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parameters": {"deltas": "mood"}}, "parameter 'deltas' and input 'delta' both name deltas; send one of them"),
        ({"outputs": [{"name": "label"}, {"name": "label"}]}, "output 'label' is asked for twice"),
    ],
)
def test_what_is_said_twice_is_refused(registry, more, message):
    with pytest.raises(DataError, match=message):
        read(registry, "mood", {"inputs": [texts("text", "a"), texts("delta", "mood")], **more})
