from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from bertology_serve.data.records import Record
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BaseMismatch, DataError, SpecError
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import VECTOR_KINDS, TaskSpec
from bertology_serve.training.baselines import rivals
from bertology_serve.training.evaluation import Evaluation, evaluate, measure, slices_of
from bertology_serve.training.plots import draw_evaluation
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig
from tests import tiny
from tests.training import sets

LABELS = ("bad", "good", "mixed")


def made(gold: list[str], found: list[str], scores: list[float] | None = None, abstain: float = 0.0) -> Evaluation:
    """A classification with these labels."""
    task = task_for(TaskSpec("classification", LABELS, abstain=abstain))
    records = [({"text": f"t{row}", "label": label, "size": row}, f"x:{row}") for row, label in enumerate(gold, 1)]
    examples = [task.example(*record, labelled=True) for record in records]
    sure = scores or [0.8] * len(gold)
    answers = [
        {"label": label, "score": score, "scores": {name: score if name == label else 0.1 for name in LABELS}}
        for label, score in zip(found, sure, strict=True)
    ]
    return Evaluation(task.metrics(answers, examples), answers, 0, task, examples, records)


GOLD = ["bad", "good", "good", "mixed", "bad", "good", "good", "bad"]
FOUND = ["bad", "good", "bad", "bad", "good", "good", "good", "bad"]


def test_classes_are_scikit_learn_s() -> None:
    reference = pytest.importorskip("sklearn.metrics")
    expected = reference.precision_recall_fscore_support(GOLD, FOUND, labels=LABELS, zero_division=0)
    found = made(GOLD, FOUND).classes
    assert [one.label for one in found] == list(LABELS)
    rows = [[one.precision, one.recall, one.f1, one.support] for one in found]
    assert np.array(rows) == pytest.approx(np.array(expected).T)
    labels, table = made(GOLD, FOUND).confusion
    assert table == reference.confusion_matrix(GOLD, FOUND, labels=labels).tolist()


@pytest.mark.parametrize("kind", sets.SETS)
def test_parts_are_the_main_metric_and_right_answers_are_no_errors(bert: Encoder, kind: str) -> None:
    source = sets.source(kind)
    ready = prepare(TrainConfig.of(kind, max_length=sets.LENGTHS.get(kind, 32)), bert, source)
    found = evaluate(ready.live.freeze("mine"), source.records, bert)
    main = found.task.main_metric
    assert found.task.main(found.parts) == pytest.approx(found.metrics[main])
    assert found.interval.low <= found.interval.value <= found.interval.high
    assert found.gain(found.task, found.answers).value == 0
    assert all(row["quality"] < 1 for row in found.errors())
    quality = [row["quality"] for row in found.errors()]
    assert quality == sorted(quality)
    same = found.against(found)
    assert (same.fixed, same.broken, same.effect) == ((), (), 0)
    known = rivals(bert, found.task, found.examples, found.examples)
    for task, answers in known.values():
        assert np.isfinite(task.main(task.parts(answers, found.examples)))
    expected = {
        "classification": ["constant"],
        "multi-label": ["constant"],
        "regression": ["constant", "cosine"],
        **dict.fromkeys(VECTOR_KINDS, ("cosine",)),
        "zero-shot": ["constant", "label names"],
    }
    assert list(known) == list(expected.get(kind, []))
    assert bool(found.classes) == (kind in ("classification", "multi-label", "token-classification", "zero-shot"))


def test_a_difference_is_counted_and_tested() -> None:
    better, worse = made(GOLD * 20, GOLD * 20), made(GOLD * 20, FOUND * 20)
    found = better.against(worse)
    assert found.gain.value == pytest.approx(3 / 8)
    assert found.gain.is_sure
    assert (len(found.fixed), len(found.broken)) == (60, 0)
    assert found.mcnemar_p < 1e-9
    assert found.effect > 0.5
    back = worse.against(better)
    assert (back.gain.value, back.fixed) == (-found.gain.value, ())
    with pytest.raises(SpecError, match="give deltas of one task"):
        better.against(made(GOLD, GOLD))


def test_intervals_end_where_the_metric_does() -> None:
    found = made(GOLD * 4, [*GOLD * 3, *GOLD[:-1], "good"]).interval
    assert found.low > 0.8
    assert found.high == 1
    parts = np.array([[1.0, 3.0], [0.5, 2.0], [0.2, 1.0]])
    embedding = task_for(TaskSpec("embedding", head="none"))
    assert task_for(TaskSpec("regression")).bounds(parts) == embedding.bounds(parts) == (-1, 1), "correlations"
    assert embedding.bounds(np.array([[0.3, 1.0]])) == (0, 1), "nDCG"


def test_the_worst_error_is_the_surest() -> None:
    rows = made(GOLD, FOUND, [0.9, 0.9, 0.6, 0.95, 0.7, 0.9, 0.9, 0.9]).errors()
    assert [row["where"] for row in rows] == ["x:4", "x:5", "x:3"]
    assert rows[0]["record"]["text"] == "t4"
    assert rows[0]["answer"]["label"] == "bad"


def test_slices() -> None:
    whole = made(GOLD, FOUND)
    assert [(one.value, one.rows) for one in whole.slices("label")] == [("good", 4), ("bad", 3), ("mixed", 1)]
    assert whole.slices("label")[0].metrics["accuracy"] == 0.75
    many = made(GOLD * 10, FOUND * 10).slices("size")
    assert [one.value for one in many] == ["1 to 20.75", "20.75 to 40.5", "40.5 to 60.25", "60.25 to 80"]
    assert sum(one.rows for one in many) == 80
    whole, stars = made(GOLD, FOUND), [10, 2, 2, 9, 2, 10, 10, 10]
    rows = [({"stars": value}, where) for value, (_, where) in zip(stars, whole.records, strict=True)]
    assert [one.value for one in replace(whole, records=rows).slices("stars")] == ["2", "9", "10"], "as numbers"
    with pytest.raises(DataError, match=r"no record has the column 'sise'; did you mean 'size'"):
        whole.slices("sise")


def test_slices_of_numbers_that_are_texts_are_in_order_and_hold_every_record() -> None:
    """80 cells of a CSV file, two of them empty."""
    numbers = [int(x) for x in np.random.default_rng(0).integers(1, 500, 78)]
    found = slices_of([*map(str, numbers), None, " "])
    assert sum(len(rows) for _, rows in found) == 80
    assert found[-1] == ("(no value)", [78, 79])
    edges = np.quantile(numbers, (0, 0.25, 0.5, 0.75, 1))
    assert [name for name, _ in found[:-1]] == [f"{a:g} to {b:g}" for a, b in pairwise(edges)]
    assert [sorted(numbers[i] for i in rows) for _, rows in found[:-1]] == [
        sorted(n for n in numbers if a < n <= b or n == a == edges[0]) for a, b in pairwise(edges)
    ]
    assert [name for name, _ in slices_of([*numbers, None, float("nan")])] == [name for name, _ in found]
    assert [name for name, _ in slices_of(["10", "9", "2", "", "2.0"])] == ["2", "9", "10", "(no value)"]


def test_what_is_beyond_twenty_values_is_one_slice() -> None:
    found = slices_of([f"shop {i}" for i in range(30)] + ["shop 7", True, None])
    assert found[0] == ("shop 7", [7, 30])
    assert [name for name, _ in found[20:]] == ["(11 other values)", "(no value)"]
    assert sorted(i for _, rows in found for i in rows) == list(range(33))


def test_large_numbers_have_parts_of_their_own() -> None:
    times = [1_700_000_000 + i for i in range(40)]
    assert [len(rows) for _, rows in slices_of(times)] == [10, 10, 10, 10]
    assert slices_of(times)[0][0] == "1700000000 to 1700000010"


def test_calibration_is_that_of_the_scores() -> None:
    right = [gold == found for gold, found in zip(GOLD, FOUND, strict=True)]
    found = made(GOLD, FOUND).calibration
    assert found.value == pytest.approx(abs(np.mean(right) - 0.8))
    assert found.low <= found.value <= found.high


def test_the_nearest_label_name_is_an_answer_without_training(minilm_path: Path) -> None:
    task = task_for(TaskSpec("classification", ("card_lost", "weather", "cooking")))
    texts = ["I cannot find my card any more", "will it rain tomorrow?", "how long do I boil an egg"]
    examples = [
        task.example({"text": text, "label": label}, "x:1", True)
        for text, label in zip(texts, task.spec.labels, strict=True)
    ]
    other, answers = rivals(Encoder.load(str(minilm_path)), task, examples, examples)["label names"]
    assert other.metrics(answers, examples)["accuracy"] == 1


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = draw_evaluation(made(GOLD, FOUND), tmp_path / "plots")
    assert [path.name for path in paths] == ["reliability.png", "confusion.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("labels", [("no", "yes"), ("0", "1")])
def test_candidates_of_each_query_are_ranked(labels: tuple[str, str]) -> None:
    """As scikit-learn's nDCG over the queries that have something relevant, by the probability of the second label."""
    reference = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    gold, p = rng.random((5, 20)) < 0.3, rng.random((5, 20))
    gold[4] = False
    task = task_for(TaskSpec("classification", labels))
    rows = [{"text": f"q{i}", "text_pair": "d", "label": labels[int(gold[i, j])]} for i in range(5) for j in range(20)]
    records = [(row, f"x:{i}") for i, row in enumerate(rows, 1)]
    examples = [task.example(*record, labelled=True) for record in records]
    answers = [{"label": labels[0], "score": 1.0, "scores": dict(zip(labels, (1 - x, x), strict=True))} for x in p.flat]
    found = Evaluation(task.metrics(answers, examples), answers, 0, task, examples, records).ranking("text")
    assert found["queries"] == 4
    assert found["ndcg@10"] == pytest.approx(reference.ndcg_score(gold[:4], p[:4], k=10))
    first = [next(i for i, j in enumerate(np.argsort(-x), 1) if y[j]) for x, y in zip(p[:4], gold[:4], strict=True)]
    assert found["mrr@10"] == pytest.approx(np.mean([1 / place if place <= 10 else 0 for place in first]))


def test_grades_are_ranked_and_what_is_none_is_refused(bert: Encoder) -> None:
    task = task_for(TaskSpec("regression"))
    rows = [{"text": "q", "text_pair": "d", "score": grade} for grade in (0, 2, 1)]
    records = [(row, f"x:{i}") for i, row in enumerate(rows, 1)]
    examples = [task.example(*record, labelled=True) for record in records]
    answers = [{"value": value} for value in (0.3, 0.2, 0.1)]
    found = Evaluation(task.metrics(answers, examples), answers, 0, task, examples, records)
    ideal = 2 + 1 / np.log2(3)
    assert found.ranking("text")["ndcg@10"] == pytest.approx((2 / np.log2(3) + 1 / 2) / ideal)
    with pytest.raises(DataError, match="no record has the column 'query'"):
        found.ranking("query")
    with pytest.raises(SpecError, match="3 labels that are no numbers rank nothing"):
        made(GOLD, FOUND).ranking("text")
    none = [(({**row, "score": 0}), where) for row, where in records]
    examples = [task.example(*record, labelled=True) for record in none]
    with pytest.raises(DataError, match="no record is relevant to its query"):
        Evaluation(found.metrics, answers, 0, task, examples, none).ranking("text")


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
