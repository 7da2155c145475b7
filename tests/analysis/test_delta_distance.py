"""Norms and spectra against dense products, CKA against the Gram-matrix form, reports of every kind of delta."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertology_serve.analysis.delta_distance import compare_features, distance
from bertology_serve.analysis.settings import DistanceSettings
from bertology_serve.analysis.subject_model import Subject, silent
from bertology_serve.analysis.weight_change import LinearCka, effective_rank, low_rank_singular
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

TASK = TaskSpec("classification", ("a", "b"), max_length=32)
TEXTS = ["Ada met the cat in Paris .", "the film was good", "a red dog and a blue cat", "who went to London ?"]


def gram_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with centred Gram matrices K, L [n, n]."""
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, other = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return float((k * other).sum() / ((k * k).sum() * (other * other).sum()).sqrt())


def test_cka_equals_the_gram_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) + 5
    y = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + torch.randn(50, 6, generator=generator)
    found = LinearCka(6)
    for part in (slice(0, 13), slice(13, 50)):
        found.add(x[part], y[part])
    assert found.value == pytest.approx(gram_cka(x, y), rel=1e-10)
    assert 0.1 < found.value < 0.99
    assert found.drift == pytest.approx(float(((y - x).norm(dim=1) / x.norm(dim=1)).mean()))


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    found = LinearCka(5)
    found.add(x, 3 * x @ rotation + 7)
    assert found.value == pytest.approx(1.0, abs=1e-12)


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
def test_low_rank_moves_equal_dense_products(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    delta = tiny.delta(encoder, "d", [Lora(("query", "down"), rank=3, alpha=6, layers=(0, 2))], TASK)
    report = distance(encoder, delta, TEXTS)
    update = delta.effects(encoder.anatomy).low_rank
    rows = {(row["slot"], row["layer"]): row for row in report.tables["weights"]}
    assert rows.keys() == {(slot, layer) for slot in ("query", "down") for layer in (0, 2)}
    for (name, layer), row in rows.items():
        slot = encoder.anatomy.slots[name]
        change = update[name].b[layer].double().T @ update[name].a[layer].double()
        weight = encoder.model.get_submodule(slot.paths[layer]).weight
        weight = weight if slot.part is None else weight[slice(*slot.part)]
        assert weight.shape == change.shape
        assert row["frobenius"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert row["relative"] == pytest.approx(float(change.norm() / weight.double().norm()), rel=1e-6)
        expected = torch.linalg.svdvals(change)[:3]
        found = [line["value"] for line in report.tables["spectra"] if (line["slot"], line["layer"]) == (name, layer)]
        assert found == pytest.approx(expected.tolist(), rel=1e-6)
        shares = expected / expected.sum()
        assert row["effective_rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-6)
        assert (row["rank"], 1 < row["effective_rank"] <= 3) == (3, True)


def test_singular_values_need_no_more_rank_than_width() -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 9)
    expected = torch.linalg.svdvals((b.T @ a).double())
    assert low_rank_singular(a, b).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (Bitfit(), {"bias"}),
        (Norms(), {"weight", "bias"}),
        (Adapter(width=3), {"adapter down", "adapter up"}),
        (Prefix(length=2), {"keys", "values"}),
        (Prompt(length=2), {"vectors"}),
    ],
)
def test_every_kind_has_a_report(spec: object, parts: set[str], tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path / "bert")
    delta = tiny.delta(encoder, "d", [spec], TASK)
    report = distance(encoder, delta, TEXTS)
    assert {row["part"] for row in report.tables["weights"]} == parts
    total = sum(float(tensor.double().square().sum()) for tensor in delta.tensors.values()) ** 0.5
    if parts != {"adapter down", "adapter up"}:  # whose biases are not in the table
        assert report.facts["frobenius"] == pytest.approx(total, rel=1e-6)
    assert all((row["relative"] is not None) == (row["part"] in ("weight", "bias")) for row in report.tables["weights"])
    features = report.tables["features"]
    assert 0 < features[-1]["cka"] < 1 - 1e-6
    paths = report.save(tmp_path / "out")
    assert json.loads(paths[0].read_text())["tables"]["features"] == features


def test_factors_are_compared_with_one(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "d", [Ia3()], TASK)
    rows = {(row["slot"], row["layer"]): row for row in distance(encoder, delta, TEXTS).tables["weights"]}
    assert {slot for slot, _ in rows} == {"key", "value", "down"}
    assert rows["down", 2]["part"] == "factors of inputs"
    change = delta.tensors["ia3.key"][1].double() - 1
    assert rows["key", 1]["frobenius"] == pytest.approx(float(change.norm()), rel=1e-5)
    assert rows["key", 1]["relative"] == pytest.approx(float(change.norm() / 32**0.5), rel=1e-5)


def test_features_of_a_layer_are_compared_over_all_batches(tmp_path: Path) -> None:
    encoder = tiny.encoder("roberta", tmp_path)
    delta = tiny.delta(encoder, "d", [Lora(rank=2, layers=(1,))], TASK)
    report = distance(encoder, delta, TEXTS, DistanceSettings(max_tokens=8))
    base, subject = Subject(encoder), Subject(encoder, delta)
    ids = [encoder.tokenizer(text)["input_ids"] for text in TEXTS]
    from bertology_serve.tasks.spec import Encoding

    encodings = [Encoding(tuple(own), (0,) * len(own)) for own in ids]
    batches = [model.pack(encodings) for model in (base, subject)]
    with torch.inference_mode():
        whole = [
            model.encoder.layers(batch, model.pools) for model, batch in zip((base, subject), batches, strict=True)
        ]
    expected = [gram_cka(x.double(), y.double()) for x, y in zip(*whole, strict=True)]
    found = [row["cka"] for row in report.tables["features"]]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[:2] == pytest.approx([1, 1], abs=1e-9)  # the delta begins in the second layer
    assert [len(found) for found in compare_features(base, [base], encodings, 64, silent)[0]] == [4]


def full_delta(encoder: Encoder) -> Delta:
    """The encoder with one query weight and the word vectors moved."""
    delta = tiny.delta(encoder, "tuned", [], TASK)
    weights = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    weights["encoder.layer.1.attention.self.query.weight"] += 0.5
    weights["embeddings.word_embeddings.weight"] *= 1.25
    return replace(delta, weights=weights)


def test_a_whole_model_is_compared_with_its_base(tmp_path: Path) -> None:
    delta = full_delta(tiny.encoder("bert", tmp_path))
    report = distance(None, delta, TEXTS)
    moved = {(row["slot"], row["layer"]): row for row in report.tables["weights"] if row["frobenius"] > 0}
    assert moved.keys() == {("query", 1), ("embeddings.word_embeddings.weight", None)}
    assert moved["query", 1]["frobenius"] == pytest.approx(0.5 * 32, rel=1e-5)
    assert moved["query", 1]["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert moved["embeddings.word_embeddings.weight", None]["relative"] == pytest.approx(0.25, rel=1e-5)
    assert report.tables["features"][-1]["cka"] < 1 - 1e-6


def test_what_has_no_distance(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    with pytest.raises(SpecError, match="--delta"):
        distance(encoder)
    delta = full_delta(encoder)
    with pytest.raises(BaseMismatch, match="no other encoder"):
        distance(encoder, delta)
    other = replace(delta, base=replace(delta.base, sha256=weights_hash({})))
    with pytest.raises(BaseMismatch, match="is not the base"):
        distance(None, other, TEXTS)
