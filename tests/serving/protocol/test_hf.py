from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bertology_serve.errors import DataError, Unsupported
from bertology_serve.serving.protocol.hf import read_task, write_task
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.tasks.redaction import restore


def ask(registry: Registry, name: str, inputs: Any, top: dict[str, Any] | None = None, **parameters: Any) -> Any:
    body: dict[str, Any] = {"inputs": inputs, **(top or {})}
    if parameters:
        body["parameters"] = parameters
    return answer(registry, name, body)


def answer(registry: Registry, name: str, body: Any) -> Any:
    call = read_task(json.dumps(body).encode(), registry.find(name))
    pipeline = registry.pipeline
    return json.loads(write_task(call, pipeline.run([pipeline.prepare(request) for request in call.requests])))


def test_classification_is_a_ranked_list_a_text(registry):
    (answer,) = ask(registry, "mood", "the cat")
    assert {entry["label"] for entry in answer} == {"bad", "good", "so-so"}
    scores = [entry["score"] for entry in answer]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)
    assert ask(registry, "mood", ["the cat"], top_k=2) == [answer[:2]]
    assert len(ask(registry, "mood", [{"text": "the cat", "text_pair": "a dog"}, "a dog"])) == 2


def test_functions_applied_to_logits(registry):
    logits = {entry["label"]: entry["score"] for entry in ask(registry, "mood", "cat", function_to_apply="none")[0]}
    sigmoid = {entry["label"]: entry["score"] for entry in ask(registry, "mood", "cat", function_to_apply="sigmoid")[0]}
    softmax = {entry["label"]: entry["score"] for entry in ask(registry, "mood", "cat", function_to_apply="softmax")[0]}
    values = torch.tensor(list(logits.values()), dtype=torch.float64)
    assert list(sigmoid.values()) == pytest.approx(values.sigmoid().tolist())
    assert [softmax[label] for label in logits] == pytest.approx(values.softmax(0).tolist())


def test_multi_label_is_every_label_with_a_sigmoid(registry):
    logits = {entry["label"]: entry["score"] for entry in ask(registry, "topics", "cat", function_to_apply="none")[0]}
    scores = {entry["label"]: entry["score"] for entry in ask(registry, "topics", "cat")[0]}
    values = torch.tensor(list(logits.values()), dtype=torch.float64)
    assert [scores[label] for label in logits] == pytest.approx(values.sigmoid().tolist())
    assert ask(registry, "topics", "cat", function_to_apply="sigmoid") == ask(registry, "topics", "cat")
    shares = {
        entry["label"]: entry["score"] for entry in ask(registry, "topics", "cat", function_to_apply="softmax")[0]
    }
    assert [shares[label] for label in logits] == pytest.approx(values.softmax(0).tolist())


def test_regression(registry):
    ((answer,),) = ask(registry, "grade", {"text": "the cat", "text_pair": "a dog"})
    assert answer["label"] == "value"


def test_entities(registry):
    found = ask(registry, "names", "Ada went to Paris", aggregation_strategy="simple")
    assert found
    assert all(entry.keys() == {"entity_group", "score", "word", "start", "end"} for entry in found)
    assert all("Ada went to Paris"[entry["start"] : entry["end"]] == entry["word"] for entry in found)
    groups = sorted({entry["entity_group"] for entry in found})
    rest = ask(registry, "names", ["Ada went to Paris"], ignore_labels=groups[:1])
    assert rest == [[entry for entry in found if entry["entity_group"] != groups[0]]]


def test_question_answering(registry):
    item = {"question": "who", "context": "Ada met the dog in London"}
    answer = ask(registry, "finder", item)
    assert answer.keys() == {"answer", "score", "start", "end"}
    assert item["context"][answer["start"] : answer["end"]] == answer["answer"]
    best, second = ask(registry, "finder", item, top_k=2)
    assert best == answer
    assert second["score"] <= best["score"]


def test_multiple_choice_is_in_our_own_shape(registry):
    assert ask(registry, "chooser", {"premise": "a", "choices": ["b", "c"]})["choice"] in (0, 1)


def test_embeddings(registry):
    one = torch.tensor(ask(registry, "sense", "the cat"))
    assert one.shape == (32,)
    assert one.norm() == pytest.approx(1, abs=1e-6)
    assert torch.tensor(ask(registry, "sense", ["the cat", "a dog"])).shape == (2, 32)
    short = torch.tensor(ask(registry, "sense", "the cat", {"dimensions": 5}))
    assert short == pytest.approx((one[:5] / one[:5].norm()).tolist(), abs=1e-6)
    raw = torch.tensor(ask(registry, "raw", "the cat"))
    assert raw.norm() > 2
    assert torch.tensor(ask(registry, "raw", "the cat", {"dimensions": 5})) == pytest.approx(raw[:5].tolist())
    assert torch.tensor(ask(registry, "raw", "the cat", {"normalize": True})).norm() == pytest.approx(1, abs=1e-6)


def test_sentence_similarity(registry):
    vectors = torch.tensor(ask(registry, "raw", ["the cat", "a dog", "the cat"]))
    found = ask(registry, "raw", {"source_sentence": "the cat", "sentences": ["a dog", "the cat"]})
    assert found == pytest.approx(torch.cosine_similarity(vectors[:1], vectors[1:]).tolist(), abs=1e-6)


def test_labels_of_a_call(registry):
    """In one list or in one text, for all inputs, as transformers' pipeline takes them; an item's own come first."""
    given = {"candidate_labels": ["cat", "cold_river"], "hypothesis_template": "not {}"}
    found = ask(registry, "labels", ["the cat", {"text": "a dog", "labels": ["house", "cat"]}], **given)
    assert [{one["label"] for one in own} for own in found] == [{"cat", "cold_river"}, {"house", "cat"}]
    text = ask(registry, "labels", "the cat", **given | {"candidate_labels": "cat, cold_river,"})
    assert [one["label"] for one in text] == [one["label"] for one in found[0]]
    assert [one["score"] for one in text] == pytest.approx([one["score"] for one in found[0]], abs=1e-5)
    (best,) = ask(registry, "labels", "the cat", **given | {"multi_label": True, "top_k": 1})
    assert best["label"] == text[0]["label"]
    assert {one["label"] for one in ask(registry, "labels", "the cat")} == {"good", "bad"}


@pytest.mark.parametrize(
    ("name", "body", "error", "message"),
    [
        ("mood", [], DataError, "the body is a list"),
        ("mood", {}, DataError, "field 'inputs' is missing"),
        ("mood", {"inputs": 7}, DataError, r"inputs\[0\]: is a number; expected a text or an object"),
        ("mood", {"inputs": "a", "parameters": 7}, DataError, "field 'parameters' is a number"),
        ("mood", {"inputs": "a", "parameters": {"top_k": 0}}, DataError, "'top_k' is out of range"),
        ("mood", {"inputs": "a", "parameters": {"top_k": 10**30}}, DataError, "'top_k' is out of range"),
        ("mood", {"inputs": "a", "parameters": {"function_to_apply": "tanh"}}, DataError, "expected one of softmax"),
        ("mood", {"inputs": "a", "parameters": {"normalize": True}}, Unsupported, "'normalize' is not supported for"),
        ("mood", {"inputs": "a", "parameters": {"candidate_labels": ["x"]}}, Unsupported, "'candidate_labels' is not"),
        ("mood", {"inputs": "a", "candidate_labels": ["x"]}, Unsupported, "has top_k, function_to_apply"),
        ("mood", {"inputs": "a", "parameters": {"topk": 1}}, Unsupported, "option 'topk' is not supported"),
        ("names", {"inputs": "a", "parameters": {"aggregation_strategy": "none"}}, DataError, "expected one of simple"),
        ("labels", {"inputs": "a", "parameters": {"function_to_apply": "none"}}, Unsupported, "has candidate_labels"),
        ("names", {"inputs": "a", "parameters": {"stride": 3}}, Unsupported, "'stride' is not supported"),
        ("names", {"inputs": "a", "parameters": {"ignore_labels": "O"}}, DataError, "expected a list of labels"),
        ("finder", {"inputs": {}, "parameters": {"max_seq_len": 3}}, Unsupported, "'max_seq_len' is not supported"),
        ("finder", {"inputs": {}, "parameters": {"top_k": 21}}, DataError, "expected an integer from 1 to 20"),
        ("sense", {"inputs": "a", "normalize": False}, Unsupported, "gives normalised embeddings"),
        ("sense", {"inputs": "a", "truncate": False}, Unsupported, "always cut"),
        ("sense", {"inputs": "a", "normalize": "yes"}, DataError, "expected true or false"),
        ("sense", {"inputs": "a", "encoding_format": "int4"}, DataError, "expected float, base64, int8"),
        ("sense", {"inputs": "a", "dimensions": 33}, DataError, "the embedding has 32"),
        ("sense", {"inputs": {"source_sentence": "a", "sentences": []}}, DataError, "field 'sentences' is a list"),
        ("sense", {"inputs": {"source_sentence": "a", "sentences": "b"}}, DataError, "field 'sentences' is a text"),
    ],
)  # fmt: skip
def test_what_would_not_be_honoured_is_refused(registry, name, body, error, message):
    with pytest.raises(error, match=message):
        answer(registry, name, body)


def test_unknown_keys_and_nulls_are_ignored(registry):
    assert ask(registry, "mood", "the cat", {"options": {"wait_for_model": True}, "other": 1}, top_k=None, stride=None)


def test_tokens_are_redacted_where_the_call_says_so(registry):
    text = "Ada went to Paris \U0001f600 ada@x.org Ada"
    plain = ask(registry, "names", text)
    found = ask(registry, "names", text, redact="replace", patterns=["EMAIL"], offsets="utf16")
    ends = [{name: value for name, value in one.items() if "utf16" not in name} for one in found["entities"]]
    assert ends == plain
    assert "ada@x.org" not in found["redacted"]
    assert restore(found["redacted"], found["placeholders"] | {"[EMAIL]": "ada@x.org"}) == text
    assert found["redactions"][-1]["end_utf16"] == found["redactions"][-1]["end"] + 1
    beside = answer(registry, "names", {"inputs": text, "redact": True})
    assert beside["redacted"].count("[") == len(beside["redactions"])


def test_spans_in_utf16_units(registry):
    context = "\U0001f600 Ada met the dog"
    found = ask(registry, "finder", {"question": "who met the dog", "context": context}, offsets="utf16")
    before = context[: found["start"]].encode("utf-16-le")
    assert found["start_utf16"] == len(before) // 2
    with pytest.raises(Unsupported, match="option 'redact' is not supported for classification"):
        ask(registry, "mood", "the cat", redact=True)
