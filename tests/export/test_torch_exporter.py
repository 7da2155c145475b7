"""Torch's exporter: encoders that the emitter cannot write, and the same graph, traced, for some that it can."""

from __future__ import annotations

import logging
import warnings

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported
from bertology_serve.export import torch_exporter
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.samples import Reference
from bertology_serve.export.torch_exporter import Graph, Product, as_products, to_onnx
from bertology_serve.kinds.effects import Effects
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny
from tests.export.cases import ALONE, CLASSES, DELTAS, EVERYTHING, TAGS, answered, encodings, padded
from tests.export.emitter.test_emit import Run
from tests.export.emitter.test_emit import difference as off

LENGTHS = (1, 2, 5, 17, 32)


def difference(encoder: Encoder, delta: Delta, merge: bool) -> float:
    """The largest |Δ| from the engine over both sides of padding, before any exporter; NaN where anything is."""
    graph = Graph(ExportInputs.of(encoder, delta, merge))
    sequences = encodings(LENGTHS, typed=len(graph.inputs) == 3)
    expected = Reference(encoder, delta).outputs(sequences)
    found = []
    for left, extra in ((False, 0), (True, 3)):
        ids, mask, types = padded(sequences, left, extra)
        with torch.inference_mode():
            out = answered(graph, *[ids, mask, types][: len(graph.inputs)])
        parts = [row[keep.bool()] for row, keep in zip(out, mask, strict=True)] if delta.task.per_token else out
        found += [(part - one).abs().max() for part, one in zip(parts, expected, strict=True)]
    return float(torch.stack(found).max())


@pytest.mark.parametrize("family", ["bert", "modernbert", "ernie"])
def test_graph_equals_the_engine(family, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    for seed, (name, (specs, task)) in enumerate((DELTAS | ALONE).items()):
        delta = tiny.delta(encoder, name, specs, task, seed)
        for merge in (True, False):
            assert difference(encoder, delta, merge) <= 1e-5, f"{name}, merge={merge}"


@pytest.mark.parametrize("family", sorted(tiny.OTHERS))
def test_families_that_the_emitter_does_not_know(family, tmp_path):
    """Among them those whose attention knows no interface: all but prefixes work, and those are refused by name."""
    encoder = tiny.encoder(family, tmp_path)
    for merge, name in ((True, "folds"), (False, "folds"), (False, "houlsby"), (True, "prompt-tags")):
        assert difference(encoder, tiny.delta(encoder, name, *DELTAS[name]), merge) <= 1e-5, name
    if family == "megatron-bert":
        with pytest.raises(Unsupported, match="a prefix cannot be put into a graph of megatron-bert"):
            Graph(ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["prefix"]), True))


@pytest.mark.parametrize(("family", "task"), [("roberta", CLASSES), ("electra", TAGS), ("ernie", CLASSES)])
def test_every_kind_at_once_equals_the_engine_in_onnx_runtime(family, task, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny._SIZE, "num_hidden_layers", 1)
    encoder = tiny.encoder(family, tmp_path)
    delta = tiny.delta(encoder, "x", EVERYTHING, task)
    run = Run.__new__(Run)
    run.parts = ExportInputs.of(encoder, delta, merge=True)
    run.session = onnxruntime.InferenceSession(onnx_ir.to_proto(to_onnx(Graph(run.parts), 20)).SerializeToString())
    assert off(run, Reference(encoder, delta)) <= 1e-5


def test_a_part_left_out_would_be_seen(tmp_path, monkeypatch):
    """Each effect changes the outputs by far more than what is allowed."""
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "x", EVERYTHING, CLASSES)
    whole = delta.effects(encoder.anatomy)
    for missing in ("low_rank", "bias", "bottleneck", "prompt", "prefix"):
        parts = {name: getattr(whole, name) for name in whole.__dataclass_fields__ if name != missing}
        reference = Reference(encoder, delta)
        with monkeypatch.context() as patch:
            patch.setattr(Delta, "effects", lambda *_, parts=parts: Effects(**parts))
            graph = Graph(ExportInputs.of(encoder, delta, True))
        sequences = encodings((9,), typed=True)
        out = answered(graph, *padded(sequences, left=False))[0]
        assert (out - reference.outputs(sequences)[0]).abs().max() > 1e-4, missing


def test_padding_is_zero_for_tasks_that_answer_for_every_token(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    graph = Graph(ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["prompt-tags"]), True))
    ids, mask, types = padded(encodings((3, 8), typed=True), left=True)
    out = answered(graph, ids, mask, types)
    assert out.shape == (2, 8, 3)
    assert (out[0, :5] == 0).all()
    assert (out[0, 5:] != 0).all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_every_pooling(pooling, tmp_path):
    encoder = tiny.encoder("distilbert", tmp_path)
    for normalize in (True, False):
        task = TaskSpec("embedding", max_length=32, head="none", pooling=pooling, normalize=normalize)
        delta = tiny.delta(encoder, "x", DELTAS["prompt"][0], task)
        assert difference(encoder, delta, True) <= 1e-5
        graph = Graph(ExportInputs.of(encoder, delta, True))
        lengths = answered(graph, *padded(encodings((4, 9), typed=False), left=False)[:2]).norm(dim=1)
        assert torch.allclose(lengths, torch.ones(2)) == normalize


def test_a_row_of_padding_alone_is_finite_and_changes_nothing(tmp_path):
    for family in ("bert", "modernbert"):
        encoder = tiny.encoder(family, tmp_path / family)
        graph = Graph(ExportInputs.of(encoder, tiny.delta(encoder, "x", *DELTAS["prefix-shifted"]), True))
        ids, mask, _ = padded(encodings((20, 9), typed=False), left=False)
        with torch.inference_mode():
            before = answered(graph, ids, mask)
            mask[1] = 0
            after = answered(graph, ids, mask)
        assert torch.isfinite(after).all()
        assert torch.equal(before[0], after[0])


def test_full_fine_tuning_is_its_own_weights(tmp_path):
    path = tiny.save("bert", tmp_path / "base")
    trained = tiny.encoder("bert", tmp_path / "trained", seed=5)
    weights = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    base = Encoder.load(path)
    head = tiny.delta(base, "full", [], CLASSES).head
    delta = Delta("full", base.ref, CLASSES, head=head, weights=weights)
    encoder = Encoder.for_delta(delta)
    assert difference(encoder, delta, True) <= 1e-5
    assert torch.equal(
        Graph(ExportInputs.of(encoder, delta, True)).model.embeddings.word_embeddings.weight,
        weights["embeddings.word_embeddings.weight"],
    )


def test_tensors_are_named_by_the_delta(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    apart = Graph(ExportInputs.of(encoder, tiny.delta(encoder, "mine", EVERYTHING, CLASSES), merge=False))
    merged = Graph(ExportInputs.of(encoder, tiny.delta(encoder, "mine", EVERYTHING, CLASSES), merge=True))
    names, left = (sorted(graph.names.values()) for graph in (apart, merged))
    assert len(set(names)) == len(names) == len(list(apart.named_parameters()))
    assert "encoder.layer.0.attention.self.query.weight" in names
    kinds = {name.removeprefix("delta.mine.") for name in names if name.startswith("delta.mine.")}
    assert {"query.0.a", "value.2.b", "key.1.bias", "ffn_norm.2.adapter.up", "prompt.vectors"} <= kinds
    assert {"prefix.0.keys", "head.classifier.weight", "embedding_norm.0.bias"} <= kinds
    folded = {name for name in names if name not in left}
    assert {name.rsplit(".", 1)[1] for name in folded} == {"a", "b", "bias"}


def test_linears_are_turned_round_and_keep_their_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 2, bias=False), nn.LayerNorm(2)))
    x = torch.randn(4, 7, 3)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    as_products(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model[0], Product)
    assert model[1][0].weight.shape == (5, 2)
    assert torch.allclose(model(x), before, atol=1e-6)


class Untraceable(torch.nn.Module):
    inputs, outputs, names = ("input_ids", "attention_mask"), ("logits",), {}
    model = torch.nn.Identity()

    def forward(self, input_ids, attention_mask):
        return input_ids * (2.0 if input_ids.sum().item() > 3 else 1.0)


def test_a_model_that_torch_cannot_trace_is_refused_by_name():
    with pytest.raises(Unsupported, match="torch cannot turn Identity into ONNX: "):
        to_onnx(Untraceable().eval(), 20)


def test_the_exporter_is_silenced_narrowly():
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    before = logger.level
    with torch_exporter._quiet():
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use something else", FutureWarning, stacklevel=1)
        assert logger.level == logging.ERROR
        with pytest.raises(FutureWarning, match="something new"):
            warnings.warn("something new", FutureWarning, stacklevel=1)
    assert logger.level == before
