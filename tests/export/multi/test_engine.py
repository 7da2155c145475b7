"""The ONNX engine behind the pipeline: the answers of the torch engine, from the same bank."""

from __future__ import annotations

import sys

import pytest
import torch

from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import Unsupported
from bertology_serve.export.multi import buckets
from bertology_serve.export.multi.engine import OnnxEngine
from tests import tiny
from tests.encoder.test_mixed import DELTAS, logits, pipeline, requests


@pytest.mark.parametrize("price", [0, 60])
def test_the_same_answers_as_torch(price, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets.buckets, "__defaults__", (price,))  # 0: every length by itself
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
    with pytest.raises(Unsupported, match=r"deberta-v2 is not among .*; take --engine torch"):
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


def test_deltas_that_scale_rows_are_refused_one_by_one(minilm_path):
    from bertology_serve.deltas.norms import NormsSpec
    from tests.encoder.test_mixed import CLASSES

    made = pipeline_of_minilm()
    made.engine = OnnxEngine(made.encoder)
    with pytest.raises(Unsupported, match="'x' scales the encoder's rows: serve it with --engine torch"):
        made.add(tiny.delta(made.encoder, "x", [NormsSpec()], CLASSES))


def pipeline_of_minilm() -> Pipeline:
    from bertology_serve.encoder.encoder import Encoder

    return pipeline(Encoder.load("minilm"))
