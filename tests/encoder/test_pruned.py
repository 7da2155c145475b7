"""A pruned encoder against the masked one: every kind of its parent's deltas, every family that can be pruned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.loading import RECORD, prune
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import BaseMismatch, FormatError, Unsupported
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny

TASK = TaskSpec("classification", ("down", "up"), max_length=32)
HEADS = ((0, 2, 3), (1,), (0, 1, 2, 3))
NEURONS = (tuple(range(0, 48, 2)), tuple(range(48)), (3, 40))
TEXTS = ("the cat was great", "a bad film", "dog", "Paris is not very cold , Ada went to London")
PRUNABLE = ("bert", "roberta", "distilbert", "electra")
EVERYWHERE = Lora(targets=("query", "key", "value", "output", "up", "down"), rank=3)


def masked(whole: Encoder) -> Encoder:
    """The same encoder with the heads and neurons that go silenced: what reads them has zero columns."""
    anatomy = whole.anatomy
    for layer in range(anatomy.layers):
        for name, kept, width in (("output", HEADS[layer], anatomy.head_width), ("down", NEURONS[layer], 1)):
            columns = torch.zeros(anatomy.slot(name).inputs, dtype=torch.bool)
            for number in kept:
                columns[number * width : (number + 1) * width] = True
            weight = whole.model.get_submodule(str(anatomy.slot(name).paths[layer])).weight
            weight[:, ~columns] = 0
    return whole


def silenced(delta: Delta) -> Delta:
    """The same for a LoRA that reads them."""
    tensors = dict(delta.tensors)
    for layer, (heads, neurons) in enumerate(zip(HEADS, NEURONS, strict=True)):
        for name, kept, width in (("output", heads, 8), ("down", neurons, 1)):
            a = tensors.get(f"lora.{name}.a")
            if a is not None:
                columns = torch.zeros(a.shape[2], dtype=torch.bool)
                for number in kept:
                    columns[number * width : (number + 1) * width] = True
                tensors[f"lora.{name}.a"] = a.clone()
                tensors[f"lora.{name}.a"][layer, :, ~columns] = 0
    return replace(delta, tensors=tensors)


def logits(encoder: Encoder, delta: Delta) -> Tensor:
    pipeline = Pipeline(encoder)
    pipeline.add(delta)
    jobs = [pipeline.prepare(Request(delta.name, {"text": text}, logits=True)) for text in TEXTS]
    return torch.tensor([answer.answer["logits"] for answer in pipeline.run(jobs)])


def pair(family: str, folder: Path) -> tuple[Encoder, Encoder]:
    """Whole and pruned."""
    whole = tiny.encoder(family, folder / "whole")
    prune(whole, HEADS, NEURONS, folder / "pruned")
    return whole, Encoder.load(str(folder / "pruned"))


@pytest.mark.parametrize("family", PRUNABLE)
def test_a_pruned_encoder_answers_as_the_masked_one(family: str, tmp_path: Path) -> None:
    whole, small = pair(family, tmp_path)
    kinds = {"lora": [EVERYWHERE], "bitfit": [Bitfit()], "adapter": [Adapter(width=4)],
             "prompt": [Prompt(length=2)], "norms": [Norms()],
             "upper": [Ia3(("key", "up"), layers=(2,)), Bitfit(layers=(1, 2)), Adapter(width=4, layers=(0,))],
             "ia3": [Ia3(("key", "value", "up"), ("down", "output"))], "prefix": [Prefix(length=2)],
             "both": [Lora(rank=2, layers=(1, 2)), Bitfit("attention"), Prefix(length=3)]}  # fmt: skip
    if family != "bert":
        kinds = {name: kinds[name] for name in ("lora", "both")}
    deltas = {name: tiny.delta(whole, name, specs, TASK, size=0.3) for name, specs in kinds.items()}
    plain = {name: logits(whole, delta) for name, delta in deltas.items()}
    silent = masked(whole)
    for name, delta in deltas.items():
        expected = logits(silent, replace(silenced(delta), base=silent.ref))
        found = logits(small, delta)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - plain[name]).abs().max() > 1e-3
    assert small.packs
    assert [small.anatomy.heads_of(layer) for layer in range(3)] == [3, 1, 4]
    assert small.anatomy.slot("up").sizes == ((32, 24), (32, 48), (32, 2))


def test_deltas_are_read_sliced_and_new_ones_come_back_as_they_were(tmp_path: Path) -> None:
    whole, small = pair("bert", tmp_path)
    specs = [EVERYWHERE, Bitfit(), Prefix(length=2, positions="shifted")]
    parents = tiny.delta(whole, "d", specs, TASK, size=0.3)
    store.save(parents, tmp_path / "d", whole.anatomy, whole.config.to_dict())
    read = small.read_delta(tmp_path / "d")
    assert read.base == small.ref
    for name, tensor in small.fitted(parents).tensors.items():
        assert torch.equal(read.tensors[name], tensor), name
    own = tiny.delta(small, "own", specs, TASK)
    store.save(own, tmp_path / "own", small.anatomy, small.config.to_dict())
    assert not (tmp_path / "own" / "adapter_config.json").exists(), "peft cannot load the encoder"
    again = small.read_delta(tmp_path / "own")
    torch.testing.assert_close(logits(small, again), logits(small, own), rtol=0, atol=0)
    beft = tiny.delta(small, "beft", [Bitfit("attention")], TASK)
    store.save(beft, tmp_path / "beft", small.anatomy, small.config.to_dict())
    torch.testing.assert_close(logits(small, small.read_delta(tmp_path / "beft")), logits(small, beft), rtol=0, atol=0)
    with pytest.raises(BaseMismatch, match="was made for"):
        logits(whole, own)


def test_pefts_deltas_are_those_of_the_parent(tmp_path: Path) -> None:
    whole, small = pair("bert", tmp_path)
    delta = tiny.delta(whole, "d", [Lora(("query", "output"), rank=2)], TASK, size=0.3)
    store.save(delta, tmp_path / "d", whole.anatomy, whole.config.to_dict())
    (tmp_path / "d" / "delta.json").unlink()
    read, expected = small.read_delta(tmp_path / "d"), small.fitted(delta)
    assert read.base == small.ref
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(read.tensors[name], tensor)


def test_a_delta_learns_on_a_pruned_encoder(tmp_path: Path) -> None:
    _, small = pair("distilbert", tmp_path)
    live = TrainableDelta(small, [EVERYWHERE, Prefix(length=2)], TASK)
    encodings = [tuple(small.tokenizer(text)["input_ids"]) for text in TEXTS]
    out = live([Encoding(ids, (0,) * len(ids)) for ids in encodings])
    torch.nn.functional.cross_entropy(out, torch.tensor([0, 1, 0, 1])).backward()
    reached = [name for name, tensor in live.tensors.items() if tensor.grad is not None and tensor.grad.any()]
    assert len([name for name in reached if name.endswith("b")]) == 6
    keys = live.named_tensors()["prefix.keys"]
    assert not keys[1, :, 8:].any()
    assert keys.grad is not None
    assert not keys.grad[1, :, 8:].any()


def test_pruned_again_it_takes_the_deltas_of_both(tmp_path: Path) -> None:
    whole, small = pair("bert", tmp_path)
    prune(small, ((0, 2), (0,), (1,)), ((0, 5), (7,), (1,)), tmp_path / "smaller")
    smaller = Encoder.load(str(tmp_path / "smaller"))
    parents, own = tiny.delta(whole, "d", [EVERYWHERE], TASK, size=0.3), tiny.delta(small, "e", [EVERYWHERE], TASK)
    direct = tmp_path / "direct"
    prune(whole, ((0, 3), (1,), (1,)), ((0, 10), (7,), (40,)), direct)
    torch.testing.assert_close(
        logits(smaller, parents), logits(Encoder.load(str(direct)), parents), rtol=1e-5, atol=1e-6
    )
    assert logits(smaller, own).isfinite().all()


def test_a_whole_checkpoint_is_sliced_too(tmp_path: Path) -> None:
    whole, _ = pair("bert", tmp_path)
    live = TrainableDelta(whole, [], TASK, full=True)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    delta = live.freeze("full", "1")
    silent = delta_of_masked(delta)
    expected = logits(Encoder.for_delta(silent), silent)
    small = Encoder.for_delta(delta, str(tmp_path / "pruned"))
    torch.testing.assert_close(logits(small, delta), expected, rtol=1e-5, atol=1e-5)


def delta_of_masked(delta: Delta) -> Delta:
    """The full delta with the silenced columns in its weights, as the masked encoder has them."""
    weights = {name: tensor.clone() for name, tensor in delta.weights.items()}
    for layer in range(3):
        for path, kept, width in ((f"encoder.layer.{layer}.attention.output.dense.weight", HEADS[layer], 8),
                                  (f"encoder.layer.{layer}.output.dense.weight", NEURONS[layer], 1)):  # fmt: skip
            gone = [i for i in range(weights[path].shape[1]) if i // width not in kept]
            weights[path][:, gone] = 0
    return replace(delta, weights=weights)


@pytest.mark.parametrize("family", ["modernbert", "mpnet", "deberta-v3"])
def test_families_that_cannot_be_pruned_say_so(family: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="expected BERT, RoBERTa, DistilBERT or ELECTRA"):
        prune(tiny.encoder(family, tmp_path), HEADS, NEURONS, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_a_layer_keeps_something_that_it_has(tmp_path: Path) -> None:
    whole = tiny.encoder("bert", tmp_path / "whole")
    for heads in (((0,), (), (1,)), ((0,), (4,), (1,)), ((0,), (1,)), ((0,), (2, 1), (1,))):
        with pytest.raises(FormatError, match="heads"):
            prune(whole, heads, NEURONS, tmp_path / "pruned")


def test_a_broken_directory_is_one_line(tmp_path: Path) -> None:
    pair("bert", tmp_path)
    record = tmp_path / "pruned" / RECORD
    values = json.loads(record.read_text())
    for change in ({"format": 2}, {"extra": 1}, {"heads": [[0]]}, {"neurons": [[99], [0], [0]]}, {"before": 3}):
        record.write_text(json.dumps(values | change))
        with pytest.raises(FormatError):
            Encoder.load(str(tmp_path / "pruned"))
    record.write_text("{")
    with pytest.raises(FormatError, match="prune the encoder again"):
        Encoder.load(str(tmp_path / "pruned"))
    record.write_text(json.dumps(values))
    (tmp_path / "pruned" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="cannot read"):
        Encoder.load(str(tmp_path / "pruned"))


def test_the_hash_is_that_of_the_small_weights(tmp_path: Path) -> None:
    whole, small = pair("bert", tmp_path)
    assert small.ref.sha256 == weights_hash(small.model.state_dict()) != whole.ref.sha256
    assert small.pruning is not None
    assert small.pruning.parent == whole.ref
    assert small.fresh().ref == small.ref
