"""Deltas beside each other: overlaps against dense singular vectors, tables against the analysis of one delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertology_serve.analysis.delta_distance import compare_deltas, distance
from bertology_serve.analysis.subject_model import Subject
from bertology_serve.analysis.weight_change import dense_directions, low_rank_directions, overlap
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.analysis.test_delta_distance import TEXTS, full_delta

TASK = TaskSpec("classification", ("a", "b"), max_length=32)


def test_low_rank_directions_are_those_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=generator), torch.randn(3, 9, generator=generator)
    found, expected = low_rank_directions(a, b), dense_directions(b.T @ a)
    assert found.left.shape == (9, 3)
    assert found.right.shape == (7, 3)
    for side in ("left", "right"):
        mine, theirs = getattr(found, side), getattr(expected, side)[:, :3]
        torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, atol=1e-5, rtol=0)


def test_overlap() -> None:
    plane = torch.eye(6, dtype=torch.float64)
    assert overlap(plane[:, :3], plane[:, :1]) == 1.0
    assert overlap(plane[:, :3], plane[:, 3:]) == 0.0
    assert overlap(plane[:, :2], plane[:, 1:4]) == 0.5
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.linalg.qr(torch.randn(64, 8, generator=generator, dtype=torch.float64)).Q for _ in range(40)]
    found = [overlap(drawn[i], drawn[i + 1]) for i in range(0, 40, 2)]
    assert sum(found) / len(found) == pytest.approx(8 / 64, rel=0.1)


def test_tables_agree_with_one_delta_alone(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    first = tiny.delta(encoder, "first", [Lora(rank=2)], TASK)
    same = replace(tiny.delta(encoder, "same", [Lora(rank=2)], TASK), tensors=first.tensors)
    first = replace(first, metrics={"accuracy": 0.75, "ood_accuracy": 0.5})
    full = replace(full_delta(tiny.encoder("bert", tmp_path / "other")), base=encoder.ref)
    report = compare_deltas([Subject(encoder, first), Subject(encoder, same), full], TEXTS)
    alone = distance(encoder, first, TEXTS)
    rows = [row for row in report.tables["layers"] if row["delta"] == "first"]
    assert [row["cka"] for row in rows] == pytest.approx([row["cka"] for row in alone.tables["features"]])
    assert report.tables["deltas"][0]["frobenius"] == pytest.approx(alone.facts["frobenius"])
    assert (report.tables["deltas"][0]["in_domain"], report.tables["deltas"][0]["out_of_domain"]) == (0.75, 0.5)
    pairs = {(row["first"], row["second"]): row for row in report.tables["pairs"]}
    twins = pairs["first", "same"]
    assert (twins["cka_last"], twins["overlap_inputs"], twins["overlap_outputs"]) == pytest.approx((1, 1, 1))
    assert twins["modules"] == 6
    other = pairs["first", "tuned"]
    assert other["modules"] == 1  # the only query that the whole model moved, by one constant
    assert 0 <= other["overlap_inputs"] < 0.9
    values = report.figures["pairs"].panels[0].values
    assert [values[i][i] for i in range(3)] == [1.0] * 3
    assert values[0][2] == values[2][0] == other["cka_last"]
    assert {path.suffix for path in report.save(tmp_path / "out")} == {".json", ".html", ".csv", ".png"}


def test_deltas_without_matrices_have_no_overlap(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    pair = [Subject(encoder, tiny.delta(encoder, "b", [Bitfit()], TASK, seed=seed)) for seed in (0, 1)]
    report = compare_deltas(pair, TEXTS)
    assert report.facts["deltas"] == ["b (1)", "b (2)"]
    assert report.tables["pairs"][0]["overlap_inputs"] is None
    assert len(report.figures["pairs"].panels) == 1


def test_what_cannot_be_set_beside(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "a")
    other: Encoder = tiny.encoder("bert", tmp_path / "b", seed=1)
    deltas = [Subject(one, tiny.delta(one, "d", [Bitfit()], TASK)) for one in (encoder, other)]
    with pytest.raises(SpecError, match="expected two or more"):
        compare_deltas(deltas[:1])
    with pytest.raises(BaseMismatch, match="different bases"):
        compare_deltas(deltas, TEXTS)
