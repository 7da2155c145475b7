"""Scores and classes in vLLM's shape."""

from __future__ import annotations

import math

import pytest

TEXTS = ["the cat was good", "a very cold river bank"]


def ask(server, **item):
    return server.post("/predict", item).json()


def test_one_text_beside_many_and_many_beside_as_many(server):
    found = {}
    for ones in ("the dog", ["the dog"], ["the dog", "the dog"]):
        answer = server.post("/score", {"model": "grade", "text_1": ones, "text_2": TEXTS}).json()
        assert (answer["object"], answer["model"]) == ("list", "grade")
        assert [(one["index"], one["object"]) for one in answer["data"]] == [(0, "score"), (1, "score")]
        found[str(ones)] = [one["score"] for one in answer["data"]]
        assert answer["usage"]["total_tokens"] > 10
    for scores in found.values():
        for text, score in zip(TEXTS, scores, strict=True):
            value = ask(server, delta="grade", text="the dog", text_pair=text)["value"]
            assert score == pytest.approx(1 / (1 + math.exp(-value)), abs=1e-6)


def test_raw_scores_and_cosines(server):
    body = {"queries": "the dog", "documents": TEXTS[0]}
    raw = server.post("/score", {"model": "grade", **body, "use_activation": False}).json()["data"][0]["score"]
    assert raw == pytest.approx(ask(server, delta="grade", text="the dog", text_pair=TEXTS[0])["value"], abs=1e-6)
    cosine = server.post("/score", {"model": "sense", **body}).json()["data"][0]["score"]
    assert cosine == pytest.approx(
        ask(server, delta="sense", text="the dog", text_pair=TEXTS[0])["similarity"], abs=1e-6
    )


@pytest.mark.parametrize("raw", [False, True])
def test_classes(server, raw):
    body = {"model": "mood", "input": TEXTS} | ({"use_activation": False} if raw else {})
    answer = server.post("/classify", body, headers={"X-Request-Id": "mine"}).json()
    assert answer["id"] == "mine"
    for index, (text, one) in enumerate(zip(TEXTS, answer["data"], strict=True)):
        own = ask(server, delta="mood", text=text, logits=True)
        assert (one["index"], one["label"], one["num_classes"]) == (index, own["label"], 3)
        wanted = own["logits"] if raw else list(own["scores"].values())
        assert one["probs"] == pytest.approx(wanted, abs=1e-6)
    assert server.post("/classify", {"model": "mood", "input": TEXTS[0]}).json()["data"][0]["index"] == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/score", {"model": "grade", "text_1": "a"}, 400, "field 'text_2' is null"),
        ("/score", {"model": "grade", "text_1": ["a", "b"], "text_2": ["c"]}, 400, "2 texts beside 1; expected one"),
        ("/score", {"model": "grade", "text_1": "a", "queries": "b", "text_2": "c"}, 400, "'text_1' and 'queries' say"),
        ("/score", {"model": "grade", "text_1": "a", "text_2": ["b", None]}, 400, "'text_2' holds null"),
        ("/score", {"model": "mood", "text_1": "a", "text_2": "b"}, 400, "not regression or embedding"),
        ("/score", {"model": "grade", "text_1": "a", "text_2": "b", "use_activation": 1}, 400, "expected true"),
        ("/classify", {"model": "mood"}, 400, "field 'input' is null"),
        ("/classify", {"model": "mood", "input": [[1, 2]]}, 400, "holds token ids"),
        ("/classify", {"model": "sense", "input": "a"}, 400, "does embedding, not classification"),
        ("/classify", {"model": "mood", "input": "a", "truncate_prompt_tokens": 8}, 400, "cut where the delta ends"),
        ("/classify", {"model": "mood", "input": "a", "truncate_prompt_tokens": -1}, 200, "probs"),
        ("/classify", [], 400, "expected an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server, path, body, status, message):
    response = server.post(path, body)
    assert response.status_code == status
    assert message in response.text
