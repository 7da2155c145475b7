from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.linear import SlotLinear, SlotNorm
from bertology_serve.errors import VerificationError
from bertology_serve.export.export_directory import architectures
from bertology_serve.export.export_inputs import ExportInputs
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.hf_model import HfReference, hf_model, task_model
from bertology_serve.export.samples import Reference, built_in
from bertology_serve.export.verify import witnesses
from tests import tiny
from tests.export.cases import DELTAS, FOLDS, SCORES, TAGS, VECTORS

WHOLE = {"folds", "lora", "bitfit-attention", "tags"}
CASES = {name: DELTAS[name] for name in ("folds", "lora", "bitfit-attention", "lora-one-layer", "probe")} | {
    "tags": (FOLDS, TAGS), "vectors": (FOLDS, VECTORS),
}  # fmt: skip


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_huggingfaces_own_model_agrees(family, tmp_path):
    """Every family and every task with a head of HuggingFace's, or with pooling of its own behind its encoder."""
    encoder = tiny.encoder(family, tmp_path)
    cases = list(built_in(encoder.tokenizer, 32))[::5]
    seen = set()
    for name, (specs, task) in CASES.items():
        delta = tiny.delta(encoder, name, specs, task)
        for one in witnesses(encoder, delta, Reference(encoder, delta), cases):
            assert one.agrees, f"{name}: {one.line()}"
            expected = architectures(delta)[0] if name in WHOLE else type(encoder.model).__name__
            assert one.name == f"transformers' {expected}"
            seen.add(name)
    biased = {name for name, (specs, _) in CASES.items() if specs in (FOLDS, DELTAS["bitfit-attention"][0])}
    assert seen == CASES.keys() - (biased - {"vectors"} if family == "modernbert" else set())  # it has no biases


def test_what_others_cannot_hold_has_no_witness(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    for name in ("prefix", "houlsby", "prompt"):
        assert HfReference.of(encoder, tiny.delta(encoder, name, *DELTAS[name])) is None


def test_an_engine_that_answers_otherwise_publishes_nothing(tmp_path, monkeypatch):
    """File and torch agree here: only somebody else's code can tell that both are wrong."""
    encoder = tiny.encoder("bert", tmp_path / "base")
    delta = tiny.delta(encoder, "mine", FOLDS, SCORES)
    done = export_delta(encoder, delta, tmp_path / "right", ExportSpec(merge=True))
    assert [one.name for one in done.report.witnesses] == ["transformers' BertModel"]
    real = HfReference.outputs
    monkeypatch.setattr(HfReference, "outputs", lambda self, texts: [out + 0.24 for out in real(self, texts)])
    with pytest.raises(VerificationError, match=r"torch against transformers' BertModel, .* no option mends that"):
        export_delta(encoder, delta, tmp_path / "wrong", ExportSpec(merge=True))
    assert not (tmp_path / "wrong").exists()


def test_a_head_without_all_that_huggingfaces_has_is_refused_by_name(tmp_path):
    """As ALBERT's, ERNIE's and Megatron's poolers would be left out by a form that does not know them."""
    encoder = tiny.encoder("bert", tmp_path)
    delta = tiny.delta(encoder, "probe", *DELTAS["probe"])
    with pytest.raises(VerificationError, match=r"BertForSequenceClassification also has bert.pooler.dense.weight"):
        task_model(ExportInputs.of(encoder, delta, True), "BertForSequenceClassification", "eager")


def test_nothing_of_the_engine_is_in_it_and_the_random_state_is_left_alone(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    state, attention = torch.random.get_rng_state(), encoder.config._attn_implementation
    model = hf_model(type(encoder.model), encoder.config, encoder.model.state_dict(), "sdpa")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert encoder.config._attn_implementation == attention
    assert model.config._attn_implementation == "sdpa"
    assert not any(isinstance(module, SlotLinear | SlotNorm) for module in model.modules())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    own = {id(parameter) for parameter in encoder.model.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in model.parameters())
