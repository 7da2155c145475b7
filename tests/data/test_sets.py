from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats
from seqeval.metrics import f1_score as span_f1
from sklearn import metrics as reference

from bertology_serve.data.sets import SETS, official_metrics
from bertology_serve.tasks.registry import TASKS, task_for
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, TOKEN_CLASSIFICATION, TaskSpec


def measured(name: str, spec: TaskSpec, records: list[tuple[Mapping[str, Any], str]], answers: list[Any]) -> Any:
    """The official metrics of answers, by way of the task's own."""
    task = task_for(spec)
    examples = [task.example({"text": "a", **fields}, where, labelled=True) for fields, where in records]
    return official_metrics(SETS[name], task.metrics(answers, examples), answers, records)


@pytest.mark.parametrize("name", [name for name, one in SETS.items() if one.task == CLASSIFICATION and one.metrics[0] in
                                  ("accuracy", "mcc")])  # fmt: skip
def test_classification_is_scikit_learn_s(name: str):
    labels = {"glue/mrpc": ["equivalent", "not"], "glue/qqp": ["duplicate", "not"], "superglue/cb": ["a", "b", "c"]}
    known = labels.get(name, ["no", "yes"])
    draw = np.random.default_rng(0)
    gold, found = draw.choice(known, 50).tolist(), draw.choice(known, 50).tolist()
    records = [({"label": label}, f"dev:{row}") for row, label in enumerate(gold)]
    own = measured(name, TaskSpec(CLASSIFICATION, tuple(known)), records, [{"label": label} for label in found])
    expected = {
        "accuracy": reference.accuracy_score(gold, found),
        "mcc": reference.matthews_corrcoef(gold, found),
        "macro_f1": reference.f1_score(gold, found, average="macro"),
    }
    if SETS[name].positive:
        expected["f1"] = reference.f1_score(gold, found, pos_label=SETS[name].positive)
    assert own == pytest.approx({metric: expected[metric] for metric in SETS[name].metrics})
    assert list(own) == list(SETS[name].metrics)


def test_regression_is_scipy_s():
    gold, noise = np.random.default_rng(0).normal(size=(2, 40))
    records = [({"label": float(value)}, f"dev:{row}") for row, value in enumerate(gold)]
    own = measured("glue/stsb", TaskSpec(REGRESSION), records, [{"value": float(v)} for v in gold + noise])
    expected = {"pearson": stats.pearsonr(gold, gold + noise)[0], "spearman": stats.spearmanr(gold, gold + noise)[0]}
    assert own == pytest.approx(expected)


def test_spans_are_seqeval_s():
    gold = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-PER"]]
    found = [["B-PER", "I-PER", "O"], ["B-PER", "O", "B-PER"]]
    records = [({"tokens": ["a"] * 3, "tags": tags}, f"dev:{row}") for row, tags in enumerate(gold)]
    spec = TaskSpec(TOKEN_CLASSIFICATION, ("O", "B-PER", "I-PER", "B-LOC"))
    task = task_for(spec)
    examples = [task.example(fields, where, labelled=True) for fields, where in records]
    answers = [{"tags": tags} for tags in found]
    own = official_metrics(SETS["conll2003"], task.metrics(answers, examples), answers, records)
    assert own == pytest.approx({"f1": span_f1(gold, found)})


def test_multirc_counts_answers_and_whole_questions():
    rows = [("0/0", "True", "True"), ("0/0", "False", "True"), ("0/1", "True", "True"), ("0/1", "False", "False"),
            ("1/0", "True", "False")]  # fmt: skip
    records = [({"label": gold, "group": group}, "dev:1") for group, gold, _ in rows]
    answers = [{"label": found} for _, _, found in rows]
    own = official_metrics(SETS["superglue/multirc"], {}, answers, records)
    gold, found = [row[1] for row in rows], [row[2] for row in rows]
    assert own == pytest.approx({"f1a": reference.f1_score(gold, found, pos_label="True"), "em": 1 / 3})


def test_record_takes_the_likeliest_entity_of_a_query():
    def row(group: str, entity: str, share: float, *golds: str) -> tuple[Any, Any]:
        label = "True" if entity in golds else "False"
        fields = {"group": group, "entity": entity, "golds": list(golds), "label": label}
        scores = {"True": share, "False": 1 - share}
        return (fields, "dev:1"), {"label": "True" if share > 0.5 else "False", "scores": scores}

    rows = [row("q", "Ada Lovelace", 0.4, "Ada"), row("q", "Bob", 0.3, "Ada"), row("r", "Paris", 0.9, "paris", "Lyon")]
    own = official_metrics(SETS["superglue/record"], {}, [answer for _, answer in rows], [fields for fields, _ in rows])
    assert own == pytest.approx({"entity_f1": (2 / 3 + 1) / 2, "entity_em": 0.5})


@pytest.mark.parametrize(("no", "yes"), [(False, True), (0, 1), ("False", "True"), ("0", "1")])
def test_the_positive_label_of_json_and_of_tables(no: Any, yes: Any):
    """Authors' files have booleans and class numbers where the hub has names."""
    gold, found = [yes, no, yes, yes], [yes, yes, no, yes]
    records = [({"label": label, "group": str(row // 2)}, f"dev:{row}") for row, label in enumerate(gold)]
    labels = tuple(TASKS[CLASSIFICATION].labels_in(records))
    answers = [{"label": labels[[no, yes].index(label)]} for label in found]
    own = measured("superglue/multirc", TaskSpec(CLASSIFICATION, labels), records, answers)
    assert own == pytest.approx({"f1a": 2 / 3, "em": 0.0})


def test_official_metrics_know_labels_however_the_file_spells_them() -> None:
    """As pandas writes a column of integers with a hole in it."""
    names, gold, given = ("0", "1"), ["1.0", "0.0", "1.0", "1.0"], ["1", "1", "0", "1"]
    answers = [{"label": label, "scores": {name: float(name == label) for name in names}} for label in given]
    records = [({"text": "x", "label": label}, "x:1") for label in gold]
    found = official_metrics(SETS["glue/mrpc"], {"accuracy": 0.5}, answers, records)
    assert found["f1"] == pytest.approx(reference.f1_score([1, 0, 1, 1], [1, 1, 0, 1]))
