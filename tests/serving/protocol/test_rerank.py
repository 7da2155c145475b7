"""Ranking as Cohere's and Jina's clients ask for it."""

from __future__ import annotations

import math

import pytest

QUERY = "the dog"
DOCUMENTS = ["a cat", "a very cold river bank", "Ada went to Paris"]


def value(server, text: str) -> float:
    return server.post("/predict", {"delta": "grade", "text": QUERY, "text_pair": text}).json()["value"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_documents_by_relevance(server, path):
    answer = server.post(path, {"model": "grade", "query": QUERY, "documents": DOCUMENTS}).json()
    assert answer["model"] == "grade"
    assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    for result in answer["results"]:
        assert result.keys() == {"index", "relevance_score"}
        wanted = 1 / (1 + math.exp(-value(server, DOCUMENTS[result["index"]])))
        assert result["relevance_score"] == pytest.approx(wanted, abs=1e-6)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 20


def test_the_best_with_their_texts(server):
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1], "title": "x"}, DOCUMENTS[2]]
    body = {"model": "grade", "query": QUERY, "documents": documents, "top_n": 2, "return_documents": True}
    results = server.post("/v1/rerank", body).json()["results"]
    assert len(results) == 2
    assert [one["document"]["text"] for one in results] == [DOCUMENTS[one["index"]] for one in results]


@pytest.mark.parametrize("model", ["sense", "base"])
def test_an_embedding_ranks_by_cosine(server, model):
    body = {"model": model, "query": QUERY, "documents": [*DOCUMENTS, QUERY]}
    first = server.post("/v2/rerank", body).json()["results"][0]
    assert (first["index"], first["relevance_score"]) == (3, pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": None}, 400, "field 'model' is null"),
        ({"model": "moot"}, 404, "no delta 'moot'"),
        ({"model": "mood"}, 400, "does classification, not regression or embedding"),
        ({"query": None}, 400, "field 'query' is null"),
        ({"documents": []}, 400, "expected a text or a list of texts"),
        ({"documents": "cat"}, 400, "field 'documents' is a text"),
        ({"documents": ["a", None]}, 400, "'documents' holds null"),
        ({"documents": ["a", {"title": "b"}]}, 400, "'documents' holds null"),
        ({"top_n": -1}, 400, "field 'top_n' is a number"),
        ({"return_documents": 1}, 400, "field 'return_documents' is a number"),
        ({"rank_fields": ["title"]}, 400, "'rank_fields' is not supported"),
        ({"max_chunks_per_doc": 3}, 400, "'max_chunks_per_doc' is not supported"),
        ({"max_tokens_per_doc": 8}, 400, "'max_tokens_per_doc' is not supported below 32"),
        ({"max_tokens_per_doc": 4096, "rank_fields": ["text"], "top_n": 0}, 200, "relevance_score"),
    ],
)
def test_what_is_wrong_is_said(server, change, status, message):
    response = server.post("/v2/rerank", {"model": "grade", "query": QUERY, "documents": DOCUMENTS, **change})
    assert response.status_code == status
    assert message in response.text


def test_a_document_that_is_no_text_is_not_ranked_without_it(server):
    """TEI's shape: ``null`` would count as no pair, and the query be rated alone."""
    response = server.post("/rerank", {"model": "grade", "query": QUERY, "texts": ["a cat", None]})
    assert response.status_code == 400
    assert "a list of texts and nothing else" in response.text
