from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.bank import DeltaBank
from bertology_serve.encoder.batch import pack
from bertology_serve.export.export_inputs import fold
from bertology_serve.export.hf_model import hf_model
from bertology_serve.kinds import kinds
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from tests import tiny
from tests.export.cases import FOLDS, encodings


def effects_of(encoder, specs, seed=0):
    tensors = kinds.init(specs, encoder.anatomy, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    return kinds.effects(
        specs, {k: v + torch.randn(v.shape, generator=generator) * 0.1 for k, v in tensors.items()}, encoder.anatomy
    )


SCALED = (Ia3(("value", "up"), ("down",)), Norms(), Lora(("value", "down"), rank=2))


@pytest.mark.parametrize("specs", [FOLDS, SCALED], ids=["sums", "factors"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folded_weights_in_plain_huggingface_equal_the_unmerged_engine(family, specs, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    effects = effects_of(encoder, specs)
    sequences = encodings((2, 5, 17, 40), typed=False)
    bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
    batch = pack(sequences, [bank.add("x", effects)] * 4, encoder.anatomy, encoder.device, padded=not encoder.packs)
    state = fold(encoder.model.state_dict(), effects, encoder.anatomy)
    untouched = fold(encoder.model.state_dict(), Effects(), encoder.anatomy)
    with torch.inference_mode():
        rows = encoder.run(batch, bank)
        plain, base = (hf_model(type(encoder.model), encoder.config, s, "eager") for s in (state, untouched))
        for packed, original in enumerate(batch.order):
            ids = torch.tensor(sequences[original].ids)[None]
            engine = rows[batch.starts[packed] : batch.starts[packed] + batch.lengths[packed]]
            found, unchanged = (
                model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
                for model in (plain, base)
            )
            assert (found - engine).abs().max() <= 1e-5
            assert (unchanged - engine).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_weights_are_summed_in_float64_and_rounded_once(family, tmp_path):
    encoder = tiny.encoder(family, tmp_path)
    effects = effects_of(encoder, [Lora(("query", "value"), rank=4)])
    state = encoder.model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    folded = fold(state, effects, encoder.anatomy)
    slot = encoder.anatomy.slot("value")
    lo, hi = slot.part or (0, slot.outputs)
    name = f"{slot.paths[1]}.weight"
    low = effects.low_rank["value"]
    exact = before[name].double()[lo:hi] + low.b[1].double().T @ low.a[1].double()
    assert torch.equal(folded[name][lo:hi], exact.float())
    assert {tensor.dtype for tensor in folded.values()} == {torch.float32}
    for key, tensor in before.items():
        assert torch.equal(state[key], tensor), f"{key} of the base was changed"
        if key not in {f"{encoder.anatomy.slot(s).paths[i]}.weight" for s in ("query", "value") for i in range(3)}:
            assert torch.equal(folded[key], tensor)


def test_a_slice_of_a_packed_projection_leaves_the_others_alone(tmp_path):
    encoder = tiny.encoder("modernbert", tmp_path)
    state = encoder.model.state_dict()
    folded = fold(state, effects_of(encoder, [Lora(("key",), rank=2)]), encoder.anatomy)
    lo, hi = encoder.anatomy.slot("key").part
    name = f"{encoder.anatomy.slot('key').paths[0]}.weight"
    changed = (folded[name] != state[name]).any(1)
    assert changed[lo:hi].all()
    assert not changed[:lo].any()
    assert not changed[hi:].any()


def test_biases_are_added_where_the_encoder_has_none(tmp_path):
    encoder = tiny.encoder("modernbert", tmp_path)
    effects = effects_of(encoder, [Bitfit("attention")])
    folded = fold(encoder.model.state_dict(), effects, encoder.anatomy)
    added = folded.keys() - encoder.model.state_dict().keys()
    assert added == {f"layers.{i}.attn.Wqkv.bias" for i in range(3)}
    expected = torch.cat([effects.bias[name][2] for name in ("query", "key", "value")])
    assert torch.equal(folded["layers.2.attn.Wqkv.bias"], expected)
    model = hf_model(type(encoder.model), encoder.config, folded, "sdpa")
    assert torch.equal(model.layers[2].attn.Wqkv.bias, expected)
