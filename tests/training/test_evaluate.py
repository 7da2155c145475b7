from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from bertology_serve.data.records import Record
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BaseMismatch, DataError
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import VECTOR_KINDS, TaskSpec
from bertology_serve.training.evaluate import evaluate, measure
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig
from tests import tiny
from tests.training import sets


@pytest.mark.parametrize("task", sets.SETS)
def test_serving_engine_and_live_delta_measure_the_same(bert: Encoder, task: str):
    source = sets.source(task)
    ready = prepare(TrainConfig.of(task, max_length=sets.LENGTHS.get(task, 32)), bert, source)
    counted = []
    found = evaluate(ready.live.freeze("mine"), source.records, bert, max_tokens=50, advance=counted.append)
    live = measure(ready.live, ready.task, ready.items, 50)
    loss = live.pop("loss", None)
    assert (loss is None) == (task in VECTOR_KINDS)
    assert found.metrics == pytest.approx(live, abs=1e-5)
    assert len(found.answers) == sum(counted) == len(source.records)


def test_measuring_leaves_the_mode_and_does_not_depend_on_batches(bert: Encoder):
    config = TrainConfig.of("classification", max_length=32, trunk_dropout=True)
    ready = prepare(config, bert, sets.source("classification"))
    ready.live.train()
    first, second = (measure(ready.live, ready.task, ready.items, most) for most in (1, 10_000))
    assert first == pytest.approx(second, rel=1e-5)
    assert ready.live.training
    assert bert.model.training


def test_an_unknown_label_names_its_row(bert: Encoder):
    source = sets.source("classification")
    delta = prepare(TrainConfig.of("classification", max_length=32), bert, source).live.freeze("mine")
    records = [*source.records, Record({"text": "cold", "label": "left"}, "test.jsonl:9")]
    with pytest.raises(DataError, match=r"test\.jsonl:9: field 'label' has the unknown label 'left'"):
        evaluate(delta, records, bert)
    with pytest.raises(DataError, match="no records"):
        evaluate(delta, [], bert)


def test_another_base_is_refused_by_name(tmp_path: Path, bert: Encoder):
    source = sets.source("classification")
    delta = prepare(TrainConfig.of("classification", max_length=32), bert, source).live.freeze("mine")
    with pytest.raises(BaseMismatch, match="delta 'mine' was made for"):
        evaluate(delta, source.records, tiny.encoder("bert", tmp_path, seed=1))


def test_texts_that_are_cut_are_counted(bert: Encoder):
    source = sets.source("classification")
    delta = prepare(TrainConfig.of("classification", max_length=32), bert, source).live.freeze("mine")
    assert evaluate(delta, source.records, bert).truncated == 0
    long = Record({"text": "the cat was good " * 20, "label": source.records[0].fields["label"]}, "test.jsonl:9")
    found = evaluate(delta, [*source.records, long], bert)
    assert found.truncated == 1
    assert [answer.get("truncated", False) for answer in found.answers] == [False] * len(source.records) + [True]
    assert found.answers[-1]["tokens_given"] > found.answers[-1]["tokens_read"] == 32


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_a_search_ranks_documents_as_pairs_are_scored(bert: Encoder, kind: str):
    """By scikit-learn's nDCG over the similarity of every query, which keeps its punctuation, with every document."""
    texts = ["the film , the dog .", "a cat ; good", "money in the bank", "red house !", "Ada went to Paris ?"]
    asks = ["good cat ?", "the bank , money !"]
    width = len(bert.model.get_input_embeddings().weight) if kind == "sparse" else 8 if kind == "multi-vector" else 0
    task = TaskSpec(kind, max_length=32, head="none" if kind == "embedding" else "hf", width=width)
    delta = tiny.delta(bert, "mine", [Lora(rank=2)], task, size=0.3)
    grades = np.array([[0, 2, 0, 1, 0], [1, 0, 1, 0, 0]])
    records = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    records += [
        {"id": f"q{i}", "text": text, "relevant": {f"d{j}": int(grade) for j, grade in enumerate(row) if grade}}
        for i, (text, row) in enumerate(zip(asks, grades, strict=True))
    ]
    found = evaluate(delta, [(record, f"x:{i}") for i, record in enumerate(records)], bert).metrics
    pipeline = Pipeline(bert, [delta])
    table = [
        [pipeline({"text": one, "text_pair": text}, "mine").answer["similarity"] for text in texts] for one in asks
    ]
    assert found["ndcg@10"] == pytest.approx(ndcg_score(grades, np.array(table), k=10), abs=1e-9)
