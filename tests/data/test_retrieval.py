from __future__ import annotations

import json

import pytest

from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError, NotFound


@pytest.fixture
def folder(tmp_path):
    """Two documents and two queries, of which one is judged."""
    corpus = [{"_id": "d1", "title": "The film", "text": "was good."}, {"_id": "d2", "title": "", "text": "A river."}]
    queries = [{"_id": "q1", "text": "films"}, {"_id": "q2", "text": "houses"}]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return tmp_path


def test_documents_and_judged_queries_are_records(folder):
    assert [fields for fields, _ in read_records(str(folder))] == [
        {"id": "d1", "text": "The film was good."},
        {"id": "d2", "text": "A river."},
        {"id": "q1", "text": "films", "relevant": {"d1": "2", "d2": "0"}},
    ]
    assert read_records(folder)[2].where == f"{folder}/queries.jsonl:1"


def test_beir_s_own_splits(folder):
    lines = (folder / "qrels.tsv").read_text()
    (folder / "qrels.tsv").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "dev.tsv").write_text(lines)
    assert len(read_records(str(folder))) == 3, "the only one there is"
    (folder / "qrels" / "train.tsv").write_text(lines.replace("q1", "q2"))
    with pytest.raises(NotFound, match=r"has no judgements 'test'; expected .*dev, train there"):
        read_records(str(folder))
    assert read_records(f"{folder}:train")[2].fields["id"] == "q2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "qrels.tsv",
            "query-id\tcorpus-id\tscore\nq1\td3\t1\n",
            r"qrels.tsv:2: document 'd3' is not in .*corpus.jsonl",
        ),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq3\td1\t1\n", r"query 'q3' is not in .*queries.jsonl"),
        ("qrels.tsv", "q\td\n1\t2\n", r"qrels.tsv:2: column 'query-id' is missing; expected query-id, corpus-id"),
        ("corpus.jsonl", '{"text": "x"}\n', r"corpus.jsonl:1: field '_id' is missing"),
    ],
)
def test_what_does_not_fit_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(str(folder))
