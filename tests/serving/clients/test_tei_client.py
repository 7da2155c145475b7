"""``tei-client``, unmodified, over a real socket; and TEI's bodies as others send them, with ``model`` added."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tei_client import HttpClient

TEXTS = ["the cat was good", "a dog"]


@pytest.fixture
def client(server) -> Iterator[Callable[[str], HttpClient]]:
    """Clients for deltas, closed at the end, which this library leaves to its callers."""
    made: list[HttpClient] = []

    def make(name: str) -> HttpClient:
        made.append(HttpClient(f"{server.url}/tei/{name}", timeout=120))
        return made[-1]

    yield make
    for one in made:
        one.client.close()


def test_embeddings(server, client):
    made = client("sense")
    assert made.health()
    assert made.info().server_model_type == "embedding"
    vectors = np.array(made.embed(TEXTS))
    one = server.post("/predict", {"delta": "sense", "text": TEXTS[0]}).json()["embedding"]
    assert vectors[0] == pytest.approx(one, abs=1e-6)

    async def embed() -> Any:
        async with made.async_client:
            return await made.async_embed(TEXTS[1])

    assert asyncio.run(embed()) == [pytest.approx(list(vectors[1]), abs=1e-6)]
    unit = np.array(client("raw").embed(TEXTS))
    assert np.linalg.norm(unit, axis=1) == pytest.approx([1, 1], abs=1e-6)
    raw = client("raw").embed(TEXTS[0], normalize=False)
    assert raw[0] == pytest.approx(
        server.post("/predict", {"delta": "raw", "text": TEXTS[0]}).json()["embedding"], abs=1e-6
    )


def test_classification(server, client):
    made = client("mood")
    assert made.info().server_model_metadata.id2label == {"0": "bad", "1": "good", "2": "so-so"}
    found = made.classify(["the cat", "a dog", "good"])
    assert len(found) == 3
    scores = [score.score for score in found[0].scores]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    raw = made.classify("the cat", raw_scores=True)[0].scores
    assert sum(np.exp([one.score for one in raw])) != pytest.approx(1, abs=1e-3)
    assert np.exp(raw[0].score) / sum(np.exp([one.score for one in raw])) == pytest.approx(scores[0], abs=1e-5)
    pair = made.classify(("the cat", "a dog"))[0].scores
    direct = server.post("/predict", {"delta": "mood", "text": "the cat", "text_pair": "a dog"}).json()
    assert {one.label: one.score for one in pair} == pytest.approx(direct["scores"], abs=1e-5)


def test_ranking(server, client):
    made = client("grade")
    ranks = made.rerank("the cat", ["a dog", "the cat", "money"], return_text=True).ranks
    assert [rank.score for rank in ranks] == sorted((rank.score for rank in ranks), reverse=True)
    assert {rank.text for rank in ranks} == {"a dog", "the cat", "money"}
    raw = made.rerank("the cat", ["a dog"], raw_scores=True).ranks[0].score
    direct = server.post("/predict", {"delta": "grade", "text": "the cat", "text_pair": "a dog"}).json()["value"]
    assert raw == pytest.approx(direct, abs=1e-5)


def test_tokens(client):
    made = client("sense")
    (result,) = made.tokenize("the cat")
    assert [token.special for token in result.tokens] == [True, False, False, True]
    assert (result.tokens[2].text, result.tokens[2].start, result.tokens[2].stop) == ("cat", 4, 7)
    assert made.decode(result.get_ids()) == ["the cat"]
    (bare,) = made.tokenize("the cat", add_special_tokens=False)
    assert len(bare.tokens) == 2
    assert made.prompt_names() == []


@pytest.mark.parametrize(
    ("path", "body", "check"),
    [
        ("/embed", {"inputs": "cat", "model": "sense", "dimensions": 4}, lambda got: len(got[0]) == 4),
        ("/embed", {"inputs": ["cat", "dog"]}, lambda got: len(got) == 2),
        ("/predict", {"inputs": "cat", "model": "mood"}, lambda got: {one["label"] for one in got} >= {"bad"}),
        ("/predict", {"inputs": [["cat"], ["cat", "dog"]], "model": "mood"}, lambda got: len(got) == 2),
        ("/predict", {"inputs": ["cat"], "model": "mood"}, lambda got: got[0]["score"] <= 1),
        ("/rerank", {"query": "a", "texts": ["b", "c"], "model": "grade"}, lambda got: len(got) == 2),
        (
            "/similarity",
            {"inputs": {"source_sentence": "cat", "sentences": ["cat", "dog"]}, "model": "sense"},
            lambda got: got[0] == pytest.approx(1, abs=1e-6) and got[1] < 1,
        ),
        ("/tokenize", {"inputs": ["cat", "dog"]}, lambda got: len(got) == 2),
        ("/decode", {"ids": [[7, 8]]}, lambda got: len(got) == 1),
    ],
)
def test_the_model_in_the_body(server, path, body, check):
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    assert check(response.json()), response.text


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/embed", [], 400, "expected an object"),
        ("/embed", {}, 400, "field 'inputs' is null"),
        ("/embed", {"inputs": []}, 400, "expected a text or a list of texts"),
        ("/embed", {"inputs": [1, 2]}, 400, "token ids"),
        ("/embed", {"inputs": [None]}, 400, "inputs[0]"),
        ("/embed", {"inputs": "a", "model": 3}, 400, "field 'model' is a number"),
        ("/embed", {"inputs": "a", "model": "mood"}, 400, "/embed is for embedding; delta 'mood' does classification"),
        ("/embed", {"inputs": "a", "model": "moot"}, 404, "no delta 'moot'"),
        ("/embed", {"inputs": "a", "normalize": False}, 400, "gives normalised embeddings"),
        ("/embed", {"inputs": "a", "normalize": 1}, 400, "expected true or false"),
        ("/embed", {"inputs": "a", "dimensions": 0}, 400, "expected an integer from 1"),
        ("/embed", {"inputs": "a", "prompt_name": "query"}, 400, "this delta has no prompts"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 400, "cut on the right"),
        ("/embed", {"inputs": "cat " * 60, "model": "sense"}, 413, "62 tokens; at most 32 are read"),
        ("/embed_sparse", {"inputs": "a"}, 400, "field 'model' is null"),
        ("/embed_sparse", {"inputs": "a", "model": "sense"}, 400, "/embed_sparse is for sparse"),
        ("/embed_all", {"inputs": "a", "model": "words"}, 400, "/embed_all is for embedding or multi-vector"),
        ("/embed_all", {"inputs": "cat " * 60, "model": "late"}, 413, "62 tokens; at most 32 are read"),
        ("/predict", {"inputs": "a"}, 400, "field 'model' is null"),
        ("/predict", {"inputs": [], "model": "mood"}, 400, "expected a text, a pair"),
        ("/predict", {"inputs": ["a", "b", "c"], "model": "mood"}, 400, "expected [text] or [text, pair]"),
        ("/predict", {"inputs": [["a"], "b"], "model": "mood"}, 400, "inputs[1] is a text"),
        ("/rerank", {"query": "a", "model": "grade"}, 400, "field 'texts' is null"),
        ("/rerank", {"query": 3, "texts": ["a"], "model": "grade"}, 400, "field 'text' is 3"),
        ("/similarity", {"inputs": {"sentences": []}, "model": "sense"}, 400, "holds no sentences"),
        ("/tokenize", {"inputs": 3}, 400, "field 'inputs' is a number"),
        ("/decode", {"ids": ["a"]}, 400, "expected a list of token ids"),
        ("/decode", {"ids": [2**40]}, 400, "expected a list of token ids"),
        ("/tei/names/predict", {"inputs": "a"}, 400, "is for classification"),
        ("/tei/moot/tokenize", {"inputs": "a"}, 404, "no delta 'moot'"),
        ("/tei/moot/decode", {"ids": [7]}, 404, "no delta 'moot'"),
        ("/tokenize", {"inputs": "a", "model": "moot"}, 404, "no delta 'moot'"),
        ("/tokenize", {"inputs": "x" * 100_001}, 413, "inputs[0]: field 'text' holds 100001 characters"),
        ("/tokenize", {"inputs": ["a"] * 1025}, 413, "the call holds 1025 items; at most 1024"),
        ("/tokenize", {"inputs": ["a " * 40_000] * 2}, 413, "more than 65536 tokens; send several"),
        ("/decode", {"ids": [[7]] * 1025}, 413, "the call holds 1025 items; at most 1024"),
        ("/decode", {"ids": [7] * 65_537}, 413, "more than 65536 tokens; send several"),
        ("/embed", {"inputs": ["a"] * 1025}, 413, "the call holds 1025 items; at most 1024"),
        ("/embed", {"inputs": "a " * 50_001}, 413, "holds 100002 characters"),
        ("/predict", {"inputs": [["a"]] * 1025, "model": "mood"}, 413, "the call holds 1025 items"),
        ("/rerank", {"query": "a", "texts": ["b"] * 1025, "model": "grade"}, 413, "the call holds 1025 items"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"] * 1024}, "model": "sense"}, 413,
         "the call holds 1025 items"),
    ],
)  # fmt: skip
def test_bad_bodies(server, path, body, status, message):
    response = server.post(path, body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]


def test_long_texts_are_cut_where_the_call_allows_it(server):
    long = server.post("/embed", {"inputs": "cat " * 60, "model": "sense", "truncate": True})
    assert long.json() == [
        pytest.approx(server.post("/embed", {"inputs": "cat " * 30, "model": "sense"}).json()[0], abs=1e-5)
    ]


def test_info(server):
    get = server.client.get
    assert get("/info").json()["model_id"] == "base"
    assert get("/info", params={"model": "grade"}).json()["model_type"].keys() == {"reranker"}
    assert get("/tei/names/info").status_code == 400
    assert get("/info", params={"model": "moot"}).status_code == 404


def test_sparse_weights_and_vectors_of_tokens(server, client):
    """As TEI has them (the client parses vectors, but asks for no weights), and as /predict."""
    texts = ["the great film", "a cat ,"]
    found = server.post("/tei/words/embed_sparse", {"inputs": texts}).json()
    assert found == server.post("/embed_sparse", {"inputs": texts, "model": "words"}).json()
    for text, rows in zip(texts, found, strict=True):
        direct = server.post("/predict", {"delta": "words", "text": text}).json()["sparse"]
        weights = {entry["index"]: entry["value"] for entry in direct}
        assert [list(entry) for entry in rows] == [["index", "value"]] * len(rows)
        assert [entry["index"] for entry in rows] == sorted(weights)
        assert {entry["index"]: entry["value"] for entry in rows} == pytest.approx(weights, abs=1e-5)
    late = client("late").embed_all(texts)
    assert [len(rows) for rows in late] == [5, 4], "a document's punctuation has no vector"
    for text, rows in zip(texts, late, strict=True):
        direct = server.post("/predict", {"delta": "late", "text": text}).json()["vectors"]
        assert np.asarray(rows) == pytest.approx(np.asarray(direct), abs=1e-5)


def test_every_token_s_last_row_is_given_of_embeddings(server, client, encoder):
    """The mean of base's rows is its embedding; /embed_all has [CLS] and [SEP] among them, as TEI."""
    (rows,) = server.post("/embed_all", {"inputs": "the cat , not"}).json()
    assert np.shape(rows) == (6, encoder.anatomy.hidden)
    (vector,) = server.post("/embed", {"inputs": "the cat , not"}).json()
    mean = np.mean(rows, 0)
    assert mean / np.linalg.norm(mean) == pytest.approx(vector, abs=1e-5)
    (own,) = client("raw").embed_all("the cat")
    assert own[0] == pytest.approx(client("raw").embed("the cat", normalize=False)[0], abs=1e-5), "it reads [CLS]"


@pytest.mark.parametrize("name", ["late", "words", "sense"])
def test_ranks_by_how_alike_texts_are(server, name):
    documents = ["a dog", "the cat .", "money"]
    ranks = server.post("/rerank", {"model": name, "query": "the cat", "texts": documents}).json()
    expected = [
        server.post("/predict", {"delta": name, "text": "the cat", "text_pair": text}).json()["similarity"]
        for text in documents
    ]
    assert {rank["index"]: rank["score"] for rank in ranks} == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    assert [rank["score"] for rank in ranks] == sorted((rank["score"] for rank in ranks), reverse=True)
    body = {"model": name, "query": "the cat", "documents": documents}
    others = server.post("/v1/rerank", body).json()["results"]
    assert [one["index"] for one in others] == [rank["index"] for rank in ranks]
