from __future__ import annotations

from pathlib import Path

import pytest

from bertology_serve.data.records import Record
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, DataError
from bertology_serve.tasks.spec import VECTOR_KINDS
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
