from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import prune
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import BaseMismatch, SpecError
from bertology_serve.export.export_inputs import fold
from bertology_serve.kinds.sparse import Sparse
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.training.compress import Budget, compress
from tests import tiny

TASK = TaskSpec("classification", labels=("up", "down"), max_length=32)
TEXTS = ["the film was good", "the river was not bad ."]


def whole(encoder: Encoder, rank: int | None = None, only: str = "") -> Delta:
    """A fully tuned model: weights moved by matrices of a rank (``None``: any), biases and norms at random."""
    live = TrainableDelta(encoder.fresh(), (), TASK, full=True)
    delta, generator = live.freeze("tuned"), torch.Generator().manual_seed(0)
    weights = dict(delta.weights)
    for path, tensor in weights.items():
        linear = tensor.dim() == 2 and "embeddings" not in path
        relative = path == "encoder.LayerNorm.weight"  # DeBERTa's norm of relative positions, which no kind reaches
        if not path.startswith(only) or relative or not (linear or tensor.dim() == 1):
            continue
        change = torch.randn(tensor.shape, generator=generator)
        if linear and rank is not None:
            left, singular, right = torch.linalg.svd(change, full_matrices=False)
            change = left[:, :rank] * singular[:rank] @ right[:rank]
        weights[path] = tensor + 0.1 * change
    return replace(delta, weights=weights)


def logits(encoder: Encoder, delta: Delta) -> torch.Tensor:
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    answers = pipeline.answer(Request(delta.name, {"text": text}, logits=True) for text in TEXTS)
    return torch.tensor([answer.answer["logits"] for answer in answers])


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "distilbert", "deberta-v3"])
def test_a_difference_of_low_rank_is_kept_whole(tmp_path: Path, family: str):
    encoder = tiny.encoder(family, tmp_path / "base")
    tuned = whole(encoder, rank=3)
    found = compress(tuned, encoder, Budget(rank=3), "small")
    expected = logits(Encoder.for_delta(tuned), tuned)
    store.save(found.delta, tmp_path / "small", encoder.anatomy, encoder.config.to_dict())
    got = logits(encoder, store.load(tmp_path / "small"))
    assert (expected - logits(encoder, whole_base(encoder, tuned))).abs().max() > 1e-3
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max().clamp_min(1)
    assert found.kept["all"] == pytest.approx(1.0)
    assert not found.delta.weights


def whole_base(encoder: Encoder, tuned: Delta) -> Delta:
    """The base with the tuned model's head."""
    return replace(tuned, name="plain", weights={})


def test_more_rank_is_nearer(bert: Encoder):
    tuned = whole(bert)
    expected = logits(Encoder.for_delta(tuned), tuned)
    kept, errors = [], []
    for rank in (1, 8, 32):
        found = compress(tuned, bert, Budget(rank=rank), "small")
        kept.append(found.kept["all"])
        errors.append(float((logits(bert, found.delta) - expected).abs().max()))
    assert kept == sorted(kept)
    assert errors == sorted(errors, reverse=True)
    assert kept[0] < 0.3 < 0.999 < kept[2]
    assert errors[2] < 1e-4 < errors[0]


def test_energy_asks_for_the_least_rank_that_keeps_it(bert: Encoder):
    tuned = whole(bert)
    found = compress(tuned, bert, Budget(energy=0.8), "small")
    below = compress(tuned, bert, Budget(rank=found.rank - 1), "small")
    assert below.kept["all"] < 0.8 <= found.kept["all"]
    assert compress(tuned, bert, Budget(energy=1.0), "small").rank == 32
    assert compress(whole(bert, rank=2), bert, Budget(energy=0.99999), "small").rank == 2


def test_layers_that_stayed_are_left_out(bert: Encoder):
    found = compress(whole(bert, only="encoder.layer.2"), bert, Budget(rank=4), "small")
    assert found.delta.specs[0].layers == (2,)
    assert set(found.kept) == {"2", "all"}
    assert found.delta.tensors["lora.query.a"].shape == (1, 4, 32)


@pytest.mark.parametrize("budget", [Budget(rank=2), Budget(share=0.5)])
def test_biases_and_norms_alone_are_kept_whole(bert: Encoder, budget: Budget):
    tuned, base = whole(bert), bert.model.state_dict()
    weights = {name: tensor if tensor.dim() == 1 else base[name] for name, tensor in tuned.weights.items()}
    tuned = replace(tuned, weights=weights)
    found = compress(tuned, bert, budget, "small")
    assert (found.delta.kinds, found.rank) == (("bitfit", "norms"), 0)
    assert (logits(bert, found.delta) - logits(Encoder.for_delta(tuned), tuned)).abs().max() < 2e-5


def test_what_no_delta_holds_is_named(bert: Encoder):
    tuned = whole(bert, rank=1)
    moved = {name: tensor + 0.5 for name, tensor in tuned.weights.items() if "word_embeddings" in name}
    found = compress(replace(tuned, weights={**tuned.weights, **moved}), bert, Budget(rank=1), "small")
    size = next(iter(moved.values())).numel()
    assert found.dropped == pytest.approx({"embeddings.word_embeddings.weight": 0.5 * size**0.5})


def test_what_cannot_be_compressed_is_said(bert: Encoder, tmp_path: Path):
    tuned = whole(bert, rank=1)
    with pytest.raises(SpecError, match="plain is a delta already"):
        compress(whole_base(bert, tuned), bert, Budget(rank=1), "small")
    with pytest.raises(SpecError, match="nothing to compress"):
        compress(replace(tuned, weights=bert.model.state_dict()), bert, Budget(rank=1), "small")
    with pytest.raises(BaseMismatch, match="tuned was tuned from"):
        compress(tuned, tiny.encoder("bert", tmp_path, seed=5), Budget(rank=1), "small")


@pytest.mark.parametrize(
    "values",
    [
        *({}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"share": 0.0}),
        *({"share": 1.5}, {"rank": 1, "share": 0.5}, {"rank": 1, "per_tensor": True}),
    ],
)
def test_budgets_that_make_no_sense(values):
    with pytest.raises(SpecError, match=r"rank|energy|share"):
        Budget(**values)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])
def test_all_entries_are_the_whole_model(tmp_path: Path, family: str):
    encoder = tiny.encoder(family, tmp_path / "base")
    tuned = whole(encoder)
    found = compress(tuned, encoder, Budget(share=1.0), "small")
    expected = logits(Encoder.for_delta(tuned), tuned)
    store.save(found.delta, tmp_path / "small", encoder.anatomy, encoder.config.to_dict())
    got = logits(encoder, store.load(tmp_path / "small"))
    assert (expected - logits(encoder, whole_base(encoder, tuned))).abs().max() > 1e-3
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max().clamp_min(1)
    assert found.kept["all"] == pytest.approx(1.0)
    assert found.delta.kinds[0] == "sparse"


def test_a_child_network_is_kept_whole_by_its_share(bert: Encoder):
    """Of a model of which a tenth of the weights was tuned, a tenth is all; it may be few rows, then few are served."""
    tuned, base = whole(bert, only="encoder.layer"), bert.model.state_dict()
    weights = dict(tuned.weights)
    for name, tensor in weights.items():
        if tensor.dim() == 2 and name.startswith("encoder.layer"):
            weights[name] = base[name].clone()
            weights[name][: len(tensor) // 10] = tensor[: len(tensor) // 10]
    tuned = replace(tuned, weights=weights)
    found = compress(tuned, bert, Budget(share=0.1), "small")
    expected = logits(Encoder.for_delta(tuned), tuned)
    assert found.kept["all"] == pytest.approx(1.0)
    assert found.rank == 4
    assert (logits(bert, found.delta) - expected).abs().max() < 2e-5
    assert compress(tuned, bert, Budget(share=0.01), "small").kept["all"] < 0.5


def test_the_largest_entries_are_kept_in_all_or_of_each_linear(bert: Encoder):
    tuned, base = whole(bert), bert.model.state_dict()
    name = "encoder.layer.1.output.dense.weight"
    tuned = replace(tuned, weights={**tuned.weights, name: base[name] + 100 * (tuned.weights[name] - base[name])})
    size = base[name].numel()
    linears = {
        key: tensor.numel() for key, tensor in base.items() if key.startswith("encoder.layer") and tensor.dim() == 2
    }
    every, each = (compress(tuned, bert, Budget(share=0.02, per_tensor=per), "small").delta for per in (False, True))
    assert every.specs[0] == Sparse(("down",), (round(0.02 * sum(linears.values())),))
    kept = dict(zip(each.specs[0].targets, each.specs[0].kept, strict=True))
    assert sum(kept.values()) == sum(round(0.02 * count) for count in linears.values())
    assert kept["down"] == 3 * round(0.02 * size)
    values = each.tensors["sparse.down.values"].abs()
    change = (tuned.weights[name] - base[name]).abs().flatten()
    assert torch.allclose(values.topk(round(0.02 * size)).values, change.topk(round(0.02 * size)).values)


def test_a_sparse_delta_is_served_beside_others_and_folds(bert: Encoder):
    tuned = whole(bert)
    small = compress(tuned, bert, Budget(share=0.05), "small").delta
    lora = compress(tuned, bert, Budget(rank=2), "lora").delta
    alone = {delta.name: logits(bert, delta) for delta in (small, lora)}
    pipeline = Pipeline(bert)
    for delta in (small, lora):
        pipeline.add(delta)
    asked = [Request(delta.name, {"text": text}, logits=True) for text in TEXTS for delta in (small, lora)]
    found = torch.tensor([answer.answer["logits"] for answer in pipeline.answer(asked)])
    for number, name in enumerate(alone):
        assert (found[number::2] - alone[name]).abs().max() < 1e-5
    folded = fold(bert.model.state_dict(), small.effects(bert.anatomy), bert.anatomy)
    merged = replace(tuned, name="merged", weights=folded)
    assert (logits(Encoder.for_delta(merged), merged) - alone["small"]).abs().max() < 1e-5
    assert (alone["small"] - alone["lora"]).abs().max() > 1e-3


def test_a_model_tuned_from_a_pruned_encoder_is_compressed(tmp_path: Path):
    parent = tiny.encoder("bert", tmp_path / "base")
    prune(parent, ((0, 2), (1,), (0, 1, 3)), ((1, 5, 9), tuple(range(48)), (3,)), tmp_path / "pruned")
    encoder = Encoder.load(str(tmp_path / "pruned"))
    tuned = whole(encoder, rank=1)
    found = compress(tuned, encoder, Budget(rank=1), "small")
    expected = logits(Encoder.for_delta(tuned), tuned)
    assert (logits(encoder, found.delta) - expected).abs().max() < 2e-5 * expected.abs().max().clamp_min(1)
