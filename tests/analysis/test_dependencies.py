"""Heads and dependencies against a computation arc by arc on transformers' own maps; maps of single sentences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertology_serve import examples
from bertology_serve.analysis import figures
from bertology_serve.analysis.attention_heads import EXAMPLE, attention, dependencies, offsets, read_sentences
from bertology_serve.analysis.head_statistics import by_words
from bertology_serve.analysis.settings import AttentionSettings
from bertology_serve.data.records import read_records
from bertology_serve.errors import DataError
from tests import tiny
from tests.analysis.test_attention import own_model

SETTINGS = AttentionSettings(fewest_arcs=1, max_tokens=64)


def naive(family: str, folder: Path, relation: str) -> dict[tuple[int, int, str], float]:
    """Accuracy of every head and direction on the built-in sentences, from eager maps, one word at a time."""
    model, encoder = own_model(folder), tiny.Encoder.load(str(folder))
    right: dict[tuple[int, int, str], int] = {}
    total = 0
    for fields, _ in read_records(examples.trees()):
        ids, owner = [encoder.tokenizer.cls_token_id], [-1]
        for number, word in enumerate(fields["tokens"]):
            pieces = encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
            ids += pieces
            owner += [number] * len(pieces)
        ids, owner = [*ids, encoder.tokenizer.sep_token_id], [*owner, -1]
        with torch.inference_mode():
            maps = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
        arcs = [(i, head - 1) for i, (head, name) in enumerate(zip(fields["heads"], fields["relations"], strict=True))
                if name == relation and head]  # fmt: skip
        total += len(arcs)
        for layer, found in enumerate(maps):
            for head, weights in enumerate(found[0].tolist()):
                words = range(len(fields["tokens"]))

                def between(i: int, j: int, weights: list = weights, owner: list = owner) -> float:
                    rows = [r for r, own in enumerate(owner) if own == i]
                    return sum(weights[r][c] for r in rows for c, own in enumerate(owner) if own == j) / len(rows)

                for i, j in arcs:
                    others = [k for k in words if k != i]
                    to = max(others, key=lambda k, i=i: between(i, k))
                    back = max(others, key=lambda k, i=i: between(k, i))
                    for way, guess in (("to", to), ("from", back)):
                        key = layer, head, way
                        right[key] = right.get(key, 0) + (guess == j)
    return {key: count / total for key, count in right.items()}


def test_the_best_head_is_that_of_a_naive_computation(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    found = dependencies(encoder, EXAMPLE, replace(SETTINGS, max_length=60))
    rows = {row["relation"]: row for row in found.tables["relations"]}
    expected = naive("bert", tmp_path, "compound")
    best = max(expected.values())
    assert rows["compound"]["accuracy"] == pytest.approx(best)
    row = rows["compound"]
    assert expected[row["layer"], row["head"], row["direction"]] == pytest.approx(best)
    assert rows["compound"]["arcs"] == 7
    assert "punct" not in rows
    assert len(found.tables["best_relations"]) == 12


def test_attention_between_words() -> None:
    attention = torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.5, 0.1, 0.2, 0.2], [0.1, 0.4, 0.3, 0.2], [0.25] * 4])
    found = by_words(attention, [-1, 0, 0, 1])
    expected = [[(0.1 + 0.2 + 0.4 + 0.3) / 2, (0.2 + 0.2) / 2], [0.5, 0.25]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_best_offset_is_counted(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    found = offsets(read_sentences(EXAMPLE, encoder.tokenizer, 60))
    apart = [
        head - 1 - i
        for fields, _ in read_records(examples.trees())
        for i, (head, name) in enumerate(zip(fields["heads"], fields["relations"], strict=True))
        if name == "det"
    ]
    assert found["det"] == (1, apart.count(1) / len(apart), len(apart))


def test_report_with_dependencies_and_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder("distilbert", tmp_path)
    report = attention(encoder, ["the cat was great"], SETTINGS, dependencies=EXAMPLE, sentences=["the dog", "a cat"])
    assert report.facts["parsed_sentences"] == 60
    assert {"dependencies", "text1-layer0", "text2-layer2"} <= report.figures.keys()
    values = report.figures["text1-layer0"].panels[1].values
    assert [sum(row) for row in values] == pytest.approx([1.0] * 4)
    assert report.figures["text1-layer0"].panels[0].row_names == ["[CLS]", "the", "dog", "[SEP]"]
    assert len(report.tables["maps"]) == 2 * 3 * 4 * 4
    figures.draw(report.figures["dependencies"], tmp_path / "dependencies.png")
    assert (tmp_path / "dependencies.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(figures, "available", lambda: False)  # drawing all maps takes its time
    assert {path.suffix for path in report.save(tmp_path / "out")} == {".json", ".html", ".csv"}


def test_what_is_not_parsed_is_said(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat"}')
    with pytest.raises(DataError, match="no parsed sentence"):
        attention(encoder, ["the cat"], dependencies=rows)
    rows.write_text('{"tokens": ["the"], "heads": [0], "relations": ["root"]}')
    with pytest.raises(DataError, match="no dependencies"):
        attention(encoder, ["the cat"], dependencies=rows)
