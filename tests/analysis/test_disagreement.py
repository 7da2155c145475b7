"""Two deltas on the same records: attributions against a naive sum, disagreements, what cannot be compared."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bertology_serve.analysis import figures, integrated_gradients
from bertology_serve.analysis.disagreement import compare
from bertology_serve.analysis.integrated_gradients import attributions, run_vectors
from bertology_serve.analysis.settings import CompareSettings
from bertology_serve.analysis.subject_model import Subject, TaskEvaluation
from bertology_serve.errors import SpecError, Unsupported
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny
from tests.training import sets

CLASSES = TaskSpec("classification", ("down", "up"), max_length=32)
TASKS = {
    "regression": TaskSpec("regression", max_length=32),
    "token-classification": TaskSpec("token-classification", ("O", "B-WHO", "B-PLACE"), max_length=32),
    "question-answering": TaskSpec("question-answering", max_length=40, stride=4),
    "multiple-choice": TaskSpec("multiple-choice", max_length=32),
    "multi-label": TaskSpec("multi-label", ("denied", "down", "up"), max_length=32),
}


def pair(family: str, folder: Path, task: TaskSpec = CLASSES) -> tuple[Subject, Subject]:
    encoder = tiny.encoder(family, folder)
    return tuple(
        Subject(encoder, tiny.delta(encoder, name, specs, task, seed=seed, size=0.5))
        for name, specs, seed in (("one", [Lora(rank=2)], 0), ("two", [Prompt(length=2)], 1))
    )


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "deberta-v3"])
def test_attributions_are_a_riemann_sum_of_gradients(family: str, tmp_path: Path) -> None:
    subject = pair(family, tmp_path)[1]
    ids = subject.encoder.tokenizer("the cat was great")["input_ids"]
    encoding = Encoding(tuple(ids), (0,) * len(ids))
    found, missed = attributions(subject, encoding, lambda out: out[:, 1], 24)
    table = subject.encoder.model.get_input_embeddings().weight.detach()
    text, blank = table[torch.tensor(ids)], table[torch.tensor([ids[0], 0, 0, 0, 0, ids[-1]])]
    if subject.encoder.tokenizer.pad_token_id != 0:
        blank[1:-1] = table[subject.encoder.tokenizer.pad_token_id]
    nodes, weights = np.polynomial.legendre.leggauss(24)
    expected = torch.zeros(len(ids))
    for node, weight in zip(nodes, weights, strict=True):
        at = (blank + (node + 1) / 2 * (text - blank))[None].float().requires_grad_()
        (gradient,) = torch.autograd.grad(run_vectors(subject, encoding, at)[0, 1], at)
        expected += float(weight) / 2 * ((text - blank) * gradient[0]).sum(-1)
    assert found == pytest.approx(expected.tolist(), abs=2e-4)
    assert found[0] == found[-1] == 0.0
    assert max(map(abs, found)) > 1e-3
    with torch.inference_mode():
        ends = [float(run_vectors(subject, encoding, one[None])[0, 1]) for one in (text, blank)]
    assert sum(found) == pytest.approx(ends[0] - ends[1], abs=max(5e-3, 2 * missed))


def test_the_vectors_of_the_text_give_its_own_answer(tmp_path: Path) -> None:
    for subject in pair("roberta", tmp_path):
        trial = TaskEvaluation(subject, sets.write(tmp_path / "rows.jsonl", sets.classification()), 2, 64)
        for item in trial.items:
            vectors = subject.encoder.model.get_input_embeddings()(torch.tensor([item.encodings[0].ids]))
            with torch.inference_mode():
                expected = trial.output(trial.pack([item]))
                found = run_vectors(subject, item.encodings[0], vectors.expand(3, -1, -1))
            torch.testing.assert_close(found, expected.expand(3, -1), rtol=1e-5, atol=1e-5)


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = pair("bert", tmp_path)
    rows = sets.write(tmp_path / "rows.jsonl", sets.classification())
    report = compare(one, two, rows, CompareSettings(shown=2, steps=8))
    records = report.tables["records"]
    assert len(records) == report.facts["records"] == 16
    answers = [[TaskEvaluation(side, rows, None, 64).measure()["accuracy"] for side in (one, two)]]
    assert report.facts["values"] == answers[0]
    assert report.facts["agreement"] == sum(row["first"] == row["second"] for row in records) / 16
    apart = report.tables["disagreements"]
    assert 0 < len(apart) < 16
    assert [row["gap"] for row in apart] == sorted((row["gap"] for row in apart), reverse=True)
    counts = report.figures["answers"].panels[0].values
    assert sum(map(sum, counts)) == 16
    assert counts[0][1] + counts[1][0] == len(apart)
    right = [sum(row[side] == row["gold"] for row in records) for side in ("first", "second")]
    assert right[0] - right[1] == report.facts["only_first_right"] - report.facts["only_second_right"]
    shown = report.figures[f"record{apart[0]['record']}"].panels
    assert [len(panel.values) for panel in shown] == [2, 3, 3]
    assert shown[0].diverging
    tokens = [row for row in report.tables["tokens"] if row["record"] == apart[0]["record"]]
    assert [row["attribution"] for row in tokens if row["side"] == "two"] == shown[0].values[1]
    monkeypatch.setattr(figures, "available", lambda: False)
    assert len(report.save(tmp_path / "out")) == 5


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_is_compared(kind: str, tmp_path: Path) -> None:
    one, two = pair("bert", tmp_path, TASKS[kind])
    rows = sets.write(tmp_path / "rows.jsonl", sets.SETS[kind]()[:4])
    report = compare(one, two, rows, CompareSettings(shown=1, attributions=kind == "regression", steps=4))
    assert len(report.tables["records"]) == 4
    assert ("tokens" in report.tables) == (kind == "regression" and report.facts["agreement"] < 1)
    assert "answers" not in report.figures
    same = compare(one, one, rows, CompareSettings(attributions=False))
    assert same.facts["agreement"] == 1.0
    assert same.tables["disagreements"] == []


def test_records_need_no_labels(tmp_path: Path) -> None:
    one, two = pair("bert", tmp_path)
    rows = sets.write(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in sets.classification()])
    report = compare(one, two, rows, CompareSettings(shown=1, attributions=False))
    assert "metric" not in report.facts
    assert "gold" not in report.tables["records"][0]
    assert report.tables["tokens"][0]["attribution"] is None


def test_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = pair("bert", tmp_path)
    other = Subject(
        one.encoder, tiny.delta(one.encoder, "x", [], TaskSpec("classification", ("a", "b"), max_length=32))
    )
    rows = sets.write(tmp_path / "rows.jsonl", sets.classification())
    with pytest.raises(SpecError, match="different questions"):
        compare(one, other, rows)
    with pytest.raises(SpecError, match="without a task"):
        compare(one, Subject(one.encoder), rows)
    with pytest.raises(SpecError, match="shown is -1"):
        CompareSettings(shown=-1)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setattr(integrated_gradients.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="no-attributions"):
        compare(one, one, rows)
