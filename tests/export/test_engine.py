"""The ONNX engine behind the pipeline: the answers of the torch engine, from the same bank."""

from __future__ import annotations

import sys

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.pruned import prune
from bertology_serve.errors import Unsupported
from bertology_serve.export import onnx_engine
from bertology_serve.export.onnx_engine import OnnxEngine
from bertology_serve.kinds.ia3 import Ia3
from tests import tiny
from tests.encoder.test_mixed import DELTAS, FACTORS, logits, pipeline, record, requests
from tests.export.cases import small


@pytest.mark.parametrize("price", [0, 60])
def test_the_same_answers_as_torch(price, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_engine.buckets, "__defaults__", (price,))  # 0: every length by itself
    made = pipeline(tiny.encoder("bert", tmp_path))
    jobs = [made.prepare(request) for request in requests()]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    found = made.run(jobs)
    for one, other in zip(found, expected, strict=True):
        assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 1e-5
        assert {key: one.answer.get(key) for key in ("label", "choice")} == {
            key: other.answer.get(key) for key in ("label", "choice")
        }


def test_deltas_come_and_go_under_one_session(tmp_path):
    made = Pipeline(tiny.encoder("bert", tmp_path))
    made.engine = engine = OnnxEngine(made.encoder)

    def differences() -> list[float]:
        jobs = [made.prepare(request) for request in requests() if request.delta in made.deltas]
        made.engine = engine
        found = made.run(jobs)
        made.engine = made.encoder
        pairs = zip(found, made.run(jobs), strict=True)
        return [(logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs]

    session = engine._session
    for seed, (name, (specs, task)) in enumerate(DELTAS.items()):
        if name != "base":
            made.add(tiny.delta(made.encoder, name, specs, task, seed))
    assert max(differences()) <= 1e-5
    for number in range(20):  # the pools grow
        made.add(tiny.delta(made.encoder, f"more-{number}", *DELTAS["all"], seed=number))
    made.remove("lora-4")
    made.add(tiny.delta(made.encoder, "all", *DELTAS["all"], seed=77))
    assert len(differences()) == 3 * (len(DELTAS) - 1)
    assert max(differences()) <= 1e-5
    assert engine._session is session


def test_what_it_cannot_run_is_said(tmp_path, monkeypatch):
    encoder = tiny.encoder("deberta-v3", tmp_path / "deberta")
    with pytest.raises(Unsupported, match=r"the relative positions of deberta-v2 go .*; take --engine torch"):
        OnnxEngine(encoder)
    encoder = tiny.encoder("bert", tmp_path / "bert")
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "packs", False)
        with pytest.raises(Unsupported, match="bert is padded; take --engine torch"):
            OnnxEngine(encoder)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[cpu\]'"):
            OnnxEngine(encoder)
    encoder.model.to(torch.bfloat16)
    with pytest.raises(Unsupported, match=r"this one is torch.bfloat16 on cpu; take --engine torch"):
        OnnxEngine(encoder)


def test_packaged_minilm(minilm_path):
    made = pipeline_of_minilm()
    jobs = [made.prepare(request) for request in requests()]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    assert made.engine.name.endswith(", fp32")
    found = made.run(jobs)
    pairs = [(logits(one.as_dict()), logits(other.as_dict())) for one, other in zip(found, expected, strict=True)]
    assert max((a - b).abs().max().item() for a, b in pairs) <= 1e-5
    one = made.run([made.prepare(Request("lora-4", requests()[1].record, logits=True))])[0]
    alone = logits(one.as_dict())
    assert (alone - logits(found[1].as_dict())).abs().max() <= 1e-5


def test_batches_that_the_graph_has_no_place_for_are_run_by_torch(tmp_path, monkeypatch):
    made = pipeline(tiny.encoder("bert", tmp_path))
    task = FACTORS["ia3"][1]
    for seed, name in enumerate(("query", "up")):
        made.add(tiny.delta(made.encoder, name, [Ia3(("value",), (name,))], task, seed))
    asked = [Request(name, record(task, 0), logits=True) for name in ("query", "up")]
    jobs = [made.prepare(request) for request in (*requests()[:15], *asked)]
    expected = made.run(jobs)
    made.engine = engine = OnnxEngine(made.encoder)
    for found in (made.run(jobs), [*made.run(jobs[:15]), *made.run(jobs[15:])]):
        pairs = zip(found, expected, strict=True)
        assert max((logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs) <= 1e-5
    assert [engine.takes(job.ready.entry) for job in jobs] == [True] * 15 + [False] * 2
    monkeypatch.setattr(made.encoder, "run", None)  # what the graph takes does not touch it
    made.run(jobs[:15])


def test_factors_are_in_the_graph(tmp_path, monkeypatch):
    made = pipeline(tiny.encoder("bert", tmp_path))
    for seed, (name, (specs, task)) in enumerate(FACTORS.items()):
        made.add(tiny.delta(made.encoder, name, specs, task, seed))
    asked = [Request(name, record(task, i), logits=True) for i in range(2) for name, (_, task) in FACTORS.items()]
    jobs = [made.prepare(request) for request in (*requests()[:15], *asked)]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    monkeypatch.setattr(made.encoder, "run", None)
    pairs = zip(made.run(jobs), expected, strict=True)
    assert max((logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs) <= 1e-5


def test_a_pruned_encoder(tmp_path, monkeypatch):
    whole = small("bert", tmp_path / "whole", monkeypatch)
    prune(whole, ((0, 2, 3), (1,)), ((1, 5), tuple(range(0, 48, 3))), tmp_path / "pruned")
    made = pipeline_of(Encoder.load(str(tmp_path / "pruned")), whole)
    jobs = [made.prepare(request) for request in requests() if request.delta in made.deltas]
    expected = made.run(jobs)
    made.engine = OnnxEngine(made.encoder)
    pairs = zip(made.run(jobs), expected, strict=True)
    assert max((logits(a.as_dict()) - logits(b.as_dict())).abs().max().item() for a, b in pairs) <= 1e-5


def pipeline_of(encoder: Encoder, whole: Encoder) -> Pipeline:
    """The parent's deltas on a pruned encoder."""
    made = Pipeline(encoder)
    for seed, (name, (specs, task)) in enumerate(DELTAS.items()):
        if name != "base":
            made.add(tiny.delta(whole, name, specs, task, seed))
    return made


def pipeline_of_minilm() -> Pipeline:
    return pipeline(Encoder.load("minilm"))
