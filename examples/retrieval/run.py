"""Search in three ways at once: dense, sparse and multi-vector, from one pass of one encoder.

    python examples/retrieval/run.py
    python examples/retrieval/run.py --out deltas --text "May I swim before work?"

Trains three small deltas on the questions in ``data``, indexes its documents over HTTP, searches, joins the rankings,
and ranks the best anew by MaxSim. nDCG@10 is that of questions that training did not see.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bertology_serve as bs
from bertology_serve.cli.common import note, table
from bertology_serve.cli.demo import MINILM, serving
from bertology_serve.client import Client
from bertology_serve.tasks.answers import Answer

DATA = Path(__file__).parent / "data"
DELTAS: dict[str, dict[str, Any]] = {
    "dense": {"task": "embedding", "layers": "top:2"},
    "sparse": {"task": "sparse", "layers": "top:2", "flops": 3e-3},
    "late": {"task": "multi-vector", "layers": "top:2"},
}
BEST, DAMPING = 5, 60  # how many are ranked anew; the constant of reciprocal rank fusion


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a file of the example."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(out: Path, epochs: int) -> None:
    """The trio, each on pairs of a question and the document that answers it."""
    encoder = bs.Encoder.load(MINILM)
    for name, settings in DELTAS.items():
        note(f"training {name}")
        bs.train(encoder, rows_of("train"), method="lora", epochs=epochs, out=out / name, overwrite=True, **settings)


def dense(query: Answer, document: Answer) -> float:
    """The cosine."""
    return float(np.dot(query.embedding or (), document.embedding or ()))


def sparse(query: Answer, document: Answer) -> float:
    """The product of the weights of the words that both have."""
    known = {word.index: word.value for word in document.sparse or ()}
    return sum(word.value * known.get(word.index, 0.0) for word in query.sparse or ())


def late(query: Answer, document: Answer) -> float:
    """MaxSim: for each vector of the query the nearest of the document."""
    return float((np.array(query.vectors) @ np.array(document.vectors).T).max(1).sum())


SCORES: dict[str, Callable[[Answer, Answer], float]] = {"dense": dense, "sparse": sparse, "late": late}
Found = dict[str, Answer]


def ranked(name: str, query: Found, index: Sequence[Found]) -> list[int]:
    """The documents by one of the trio, best first."""
    return sorted(range(len(index)), key=lambda i: -SCORES[name](query[name], index[i][name]))


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Reciprocal rank fusion (Cormack et al. 2009) of several rankings."""
    scores = dict.fromkeys(rankings[0], 0.0)
    for one in rankings:
        for rank, document in enumerate(one, 1):
            scores[document] += 1.0 / (DAMPING + rank)
    return sorted(scores, key=lambda document: -scores[document])


def reranked(url: str, text: str, order: Sequence[int], documents: Sequence[str]) -> list[int]:
    """The best of a ranking anew, by the multi-vector delta behind ``/v1/rerank``."""
    best = list(order[:BEST])
    body = json.dumps({"model": "late", "query": text, "documents": [documents[i] for i in best]}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/rerank", body), timeout=60) as reply:
        return [best[one["index"]] for one in json.load(reply)["results"]] + list(order[BEST:])


def ndcg(order: Sequence[int], relevant: int) -> float:
    """nDCG@10 where one document is relevant."""
    rank = order.index(relevant) + 1
    return 1.0 / math.log2(rank + 1) if rank <= 10 else 0.0


def main() -> None:
    """Trains, serves, indexes, searches, and shows how well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the deltas go (default: nowhere lasting)")
    parser.add_argument("--text", default="May I swim before work?")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    rows, queries = rows_of("documents"), rows_of("queries")
    places, documents = {row["id"]: i for i, row in enumerate(rows)}, [row["text"] for row in rows]
    gains: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        train(out, options.epochs)
        with serving(out) as url, Client(url) as client:
            index = [client.ask_many([*DELTAS], {"text": text}) for text in documents]  # one pass a document

            def search(text: str) -> dict[str, list[int]]:
                query = client.ask_many([*DELTAS], {"text": text, "input_type": "query"})
                found = {name: ranked(name, query, index) for name in SCORES}
                found["dense + sparse"] = fused([found["dense"], found["sparse"]])
                return found | {"reranked": reranked(url, text, found["dense + sparse"], documents)}

            for query in queries:
                for name, order in search(query["text"]).items():
                    gains.setdefault(name, []).append(ndcg(order, places[query["relevant"]]))
            best = search(options.text)["reranked"]
    figures = [[name, f"{sum(own) / len(own):.3f}"] for name, own in gains.items()]
    table(f"{len(queries)} questions, {len(documents)} documents", ["by", "nDCG@10"], figures, stderr=False)
    note(f"{options.text}\n  {documents[best[0]]}\n  {documents[best[1]]}")


if __name__ == "__main__":
    main()
