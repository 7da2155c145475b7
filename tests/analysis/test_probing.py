"""Probes against scikit-learn, planted answers that only some layer holds, and control tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bertology_serve import examples
from bertology_serve.analysis import probing
from bertology_serve.analysis.probe_tasks import Control, ProbeItem, content_words, items, length_edges, make_text
from bertology_serve.analysis.probing import Features, block_ends, fit, fit_mix, gather, online_code, probe, score
from bertology_serve.analysis.settings import ProbeSettings
from bertology_serve.analysis.subject_model import Subject
from bertology_serve.data.records import Record
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import DataError, SpecError
from bertology_serve.families import compat
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.logistic import LOOSE, Solution
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.training import sets


@pytest.mark.parametrize("classes", [2, 3])
def test_probe_is_scikit_learns_logistic_regression(classes: int) -> None:
    """Which has half the penalty of ours for two classes: its one vector w is W = (-w/2, w/2)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 1, 1, 0]) + 3
    y = (x[:, 0] - 3 + torch.randn(200, generator=generator) > 0).long() + (x[:, 1] > 10).long()
    y = y.clamp(max=classes - 1)
    found = fit(x, y, classes, 1e-2)
    scaled = ((x - x.mean(0)) / x.std(0, unbiased=False).clamp(min=1e-7)).numpy()
    c = (2 if classes == 2 else 1) / (1e-2 * len(x))
    expected = LogisticRegression(C=c, tol=1e-12, max_iter=10_000).fit(scaled, y.numpy())
    assert found.logits(x).softmax(1).numpy() == pytest.approx(expected.predict_proba(scaled), abs=1e-4)
    weight = (found.weight * x.std(0, unbiased=False)).numpy()
    assert (weight[1:] * 2 if classes == 2 else weight) == pytest.approx(expected.coef_, abs=1e-3)


def test_answers_that_are_all_the_same_are_read_without_error() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    found = score(fit(x, torch.zeros(20, dtype=torch.int64), 1, 1e-3), x, torch.zeros(20, dtype=torch.int64))
    assert (found.accuracy, found.bits) == (1.0, 0.0)


def test_scores() -> None:
    probe = Solution(torch.eye(3, dtype=torch.float64), torch.zeros(3), 0.0, torch.zeros(0))
    x = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 0]])
    found = score(probe, x, torch.tensor([0, 1, 1, 0]))
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found.bits == pytest.approx((torch.tensor(3.0).log2().item() + 9 / torch.log(torch.tensor(2.0)).item()) / 4,
                                       abs=1e-2)  # fmt: skip


def test_features_of_all_layers_are_those_of_one_text_alone(tmp_path: Path) -> None:
    encoder = tiny.encoder("deberta-v3", tmp_path)
    task = TaskSpec("classification", ("a", "b"), max_length=32)
    subject = Subject(encoder, tiny.delta(encoder, "d", [Prompt(length=2)], task))
    words = [["Ada", "went", "to", "Paris"], ["the", "film"], ["cold"]]
    texts = [make_text(Record({"tokens": own}, "here"), encoder.tokenizer, 16) for own in words]
    encodings = [text.encoding for text in texts]
    found = gather(subject, encodings, [[1, 4], [2], []])
    assert (found.texts.shape, found.words.shape) == ((4, 3, 32), (4, 3, 32))
    for number, rows in ((0, [1, 4]), (1, [2])):
        batch = subject.pack([encodings[number]])
        with torch.inference_mode():
            alone = torch.stack([hidden[batch.text_rows] for hidden in encoder.layers(batch, subject.pools)])
        torch.testing.assert_close(found.texts[:, number], alone.mean(1), atol=1e-5, rtol=1e-5)
        first = 0 if number == 0 else 2
        torch.testing.assert_close(found.words[:, first : first + len(rows)], alone[:, rows], atol=1e-5, rtol=1e-5)


def test_padded_rows_give_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.save("electra", tmp_path)
    words = [["Ada", "went", "to", "Paris"], ["the", "film"]]
    sides = []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(compat, "connect", lambda *_: False)
        encoder = Encoder.load(path)
        assert encoder.packs is not padded
        texts = [make_text(Record({"tokens": own}, "here"), encoder.tokenizer, 16) for own in words]
        sides.append(gather(Subject(encoder), [text.encoding for text in texts], [[2], [1, 2]]))
    torch.testing.assert_close(sides[0].texts, sides[1].texts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sides[0].words, sides[1].words, atol=1e-5, rtol=1e-5)


def test_items_and_control_labels(tmp_path: Path) -> None:
    tokenizer = tiny.encoder("bert", tmp_path).tokenizer
    records = [Record({"text": " ".join(["cat"] * n), "label": n}, "here") for n in range(1, 13)]
    texts = [make_text(record, tokenizer, 8) for record in records]
    lengths = items("length", texts, length_edges(texts))
    assert [item.answer for item in lengths] == [str(n // 2) for n in range(12)]
    positions = items("position", texts, [])
    assert {item.answer for item in positions} == set("012345")  # eight tokens hold six words
    assert [item.row for item in positions[-6:]] == [1, 2, 3, 4, 5, 6]
    train = [ProbeItem(0, 0, "a", "x")] * 9 + [ProbeItem(0, 0, "b", "x")]
    control = Control(train, 0)
    drawn = [control.answer(ProbeItem(0, 0, "?", f"word {n}")) for n in range(1000)]
    assert drawn == [Control(train, 0).answer(ProbeItem(7, 3, "!", f"word {n}")) for n in range(1000)]
    assert 60 < drawn.count("b") < 140


def test_a_planted_answer_is_found_in_its_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words hold their tag in layer 2 alone, and every layer holds their type, which controls are learnt from."""
    encoder = tiny.encoder("bert", tmp_path)
    rows = [{"tokens": [f"w{(n + i) % 7}" for i in range(6)], "tags": ["A" if (n * 5 + i * i) % 3 else "B"
             for i in range(6)]} for n in range(60)]  # fmt: skip

    def planted(subject, encodings, wanted, *_):
        flat = [(text, row) for text, own in enumerate(wanted) for row in own]
        words = torch.randn(4, len(flat), 32, generator=torch.Generator().manual_seed(1)) * 0.01
        for place, (text, row) in enumerate(flat):
            words[2, place, 0] = {"A": 1.0, "B": -1.0}[tags[len(encodings)][text][row - 1]]
        return Features(torch.zeros(4, len(encodings), 32), words)

    split = {"train": rows[:40], "eval": rows[40:]}
    tags = {len(own): [row["tags"] for row in own] for own in split.values()}
    paths = {name: sets.write(tmp_path / f"{name}.jsonl", own) for name, own in split.items()}
    monkeypatch.setattr(probing, "gather", planted)
    settings = ProbeSettings(tasks=("tags",), code=False, mix=False)
    report = probe(encoder, paths["train"], settings, eval=paths["eval"])
    accuracies = [row["accuracy"] for row in report.tables["layers"]]
    assert accuracies[2] == 1.0
    assert max(accuracies[:2] + accuracies[3:]) < 0.8
    assert report.facts["best_layer"] == {"tags": 2}
    best = report.tables["layers"][2]
    assert best["selectivity"] == pytest.approx(1.0 - best["control_accuracy"])


def test_report_of_real_layers(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    rows = sets.write(tmp_path / "rows.jsonl", sets.token_classification() * 4)
    report = probe(encoder, rows, ProbeSettings(code=False, mix=False))
    table = report.tables["layers"]
    assert [(row["task"], row["layer"]) for row in table[::4]] == [("length", 0), ("position", 0), ("tags", 0)]
    assert table[8]["accuracy"] == 1.0  # five words, each always of the same tag
    assert report.facts["texts"] == [18, 6]
    assert report.facts["items"]["tags"] == [90, 30]
    report.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["tables"]["layers"] == table


@pytest.mark.parametrize(
    ("row", "settings", "error", "message"),
    [
        ({"text": "good"}, {"tasks": ("tags",)}, SpecError, "needs a field 'tags'"),
        ({"text": "good"}, {"tasks": ("depth",)}, SpecError, "needs a field 'heads'"),
        ({"text": "good"}, {"tasks": ("content",)}, SpecError, "needs two words"),
        ({"tokens": ["a", "b"], "heads": [2, 1]}, {}, DataError, "go in a circle"),
        ({"text": "good"}, {"tasks": ("lenght",)}, SpecError, "did you mean 'length'"),
        ({"text": "good", "text_pair": "bad"}, {}, DataError, "single texts"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, DataError, "has 1 items; expected 2"),
        ({"tokens": []}, {}, DataError, "no words"),
    ],
)
def test_what_cannot_be_probed(row, settings, error, message, tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    path = sets.write(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(error, match=message):
        probe(encoder, path, ProbeSettings(**settings))


def test_one_record_is_not_enough(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    with pytest.raises(DataError, match="holds one record"):
        probe(encoder, sets.write(tmp_path / "rows.jsonl", [{"text": "good"}]))


def test_a_word_without_a_tag_is_not_asked_for() -> None:
    text = make_text(Record({"tokens": ["the", "film", "was"], "tags": [3, -100, "O"]}, "x"), tiny.tokenizer(), 16)
    assert [item.answer for item in items("tags", [text], [])] == ["3", "O"]


def test_depth_and_content(tmp_path: Path) -> None:
    tokenizer = tiny.encoder("bert", tmp_path).tokenizer
    tree = make_text(
        Record({"tokens": ["the", "cat", "was", "in", "Paris"], "heads": [2, 3, 0, 5, 3]}, "x"), tokenizer, 16
    )
    assert [item.answer for item in items("depth", [tree], [])] == ["2", "1", "0", "2", "1"]
    chain = make_text(Record({"tokens": ["a"] * 9, "heads": [*range(9)]}, "x"), tokenizer, 16)
    assert [item.answer for item in items("depth", [chain], [])][-4:] == ["5", "6", "6", "6"]
    rows = ["the cat is red"] * 11 + ["the dog is red"] * 10 + ["a Dog and a cat"] + ["the house"] * 200
    texts = [make_text(Record({"text": row}, "x"), tokenizer, 16) for row in rows]
    words = content_words(texts)
    assert words == ["is", "red", "cat", "dog"]
    found = items("content", texts, [], ["cat", "dog"])
    assert [item.answer for item in found] == ["cat"] * 11 + ["dog"] * 10


def test_the_online_code_is_the_sum_of_its_blocks() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 4, generator=generator), torch.randint(3, (300,), generator=generator)
    x[:, 0] += 2 * y
    assert block_ends(300) == [19, 38, 75, 150, 300]
    assert block_ends(5) == [5]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(7))
    expected = 19 * math.log2(3)
    for start, end in ((19, 38), (38, 75), (75, 150), (150, 300)):
        own = fit(x[order[:start]], y[order[:start]], 3, 1e-2, LOOSE).logits(x[order[start:end]]).softmax(1)
        expected -= sum(
            math.log2(row[label]) for row, label in zip(own.tolist(), y[order[start:end]].tolist(), strict=True)
        )
    assert online_code(x, y, 3, 1e-2, 7) == pytest.approx(expected, rel=1e-4)
    assert online_code(x, y, 3, 1e-2, 7) < 300 * math.log2(3) < online_code(x, y.flip(0), 3, 1e-2, 7) * 1.1


def test_a_mix_reads_where_the_answer_lies() -> None:
    generator = torch.Generator().manual_seed(2)
    y, gold = torch.randint(2, (200,), generator=generator), torch.randint(2, (50,), generator=generator)
    x, held = torch.randn(3, 200, 6, generator=generator), torch.randn(3, 50, 6, generator=generator)
    x[2, :, 0] += 3 * y
    held[2, :, 0] += 3 * gold
    found = fit_mix(x, y, held, gold, 2, 1e-3)
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-5)
    assert int(found.weights.argmax()) == 2
    assert found.accuracy > 0.85
    assert found.centre > 1.0


def test_parsed_sentences_are_probed(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    settings = ProbeSettings(tasks=("depth",), rows=40, most=10, penalty=0.1)
    report = probe(encoder, examples.trees(), settings)
    assert {row["task"] for row in report.tables["mix"]} == {"depth"}
    assert [row["weight"] for row in report.tables["mix"]][:4] != [0.25] * 4
    for row in report.tables["layers"]:
        assert row["code_kbits"] > 0
        assert 0.1 < row["compression"] < 5
    assert report.facts["mix"]["depth"]["centre"] <= 3
    assert [panel.y_label for panel in report.figures["layers"].panels][-2:] == [
        "compression (times shorter)", "weight of the layer (fraction)",
    ]  # fmt: skip
