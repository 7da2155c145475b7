"""BERT's layers as modules of our own beside transformers' own model, which is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertology_serve.encoder.bank import BARE, LiveBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.families.compat import disconnect, is_own
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny

ENCODINGS = [Encoding(tuple(range(5, 5 + length)), (0,) * length) for length in (3, 9, 3, 17)]


def both(path: str) -> tuple[Encoder, Encoder]:
    return Encoder(path, light=True), Encoder(path)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_it_is_transformers_model(family, tmp_path):
    light, whole = both(tiny.save(family, tmp_path))
    assert is_own(light.model)
    assert not is_own(whole.model)
    assert (light.ref, light.anatomy, light.shape) == (whole.ref, whole.anatomy, whole.shape)
    assert light.model.state_dict().keys() == whole.model.state_dict().keys()
    assert light.base_head.keys() == whole.base_head.keys()
    assert light.packs
    for encoder in (light, whole):
        encoder.model.double()
    rows = [one.run(one.pack(ENCODINGS, [BARE] * 4), LiveBank([])) for one in (light, whole)]
    torch.testing.assert_close(*rows, atol=1e-12, rtol=0)
    batch = light.pack(ENCODINGS, [BARE] * 4)
    for mine, theirs in zip(light.layers(batch, LiveBank([])), whole.layers(batch, LiveBank([])), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    own = (torch.arange(4) + light.anatomy.position_offset)[None].expand(2, 4)
    for encoder in (light, whole):
        disconnect(encoder.model)
    dense = [
        one.model(input_ids=ids, attention_mask=mask, position_ids=own).last_hidden_state[mask == 1]
        for one in (light, whole)
    ]
    torch.testing.assert_close(*dense, atol=1e-12, rtol=0)


def test_of_the_packaged_minilm_it_gives_the_same_bits(minilm_path):
    light, whole = both("minilm")
    batch = light.pack(ENCODINGS, [BARE] * 4)
    with torch.inference_mode():
        assert torch.equal(light.run(batch, LiveBank([])), whole.run(batch, LiveBank([])))


def test_deltas_are_trained_and_applied_alike(tmp_path):
    made = [tiny.delta(one, "x", [Lora(rank=2)], TaskSpec("classification", ("a", "b"), 16), 1) for one in
            both(tiny.save("bert", tmp_path))]  # fmt: skip
    assert made[0].tensors.keys() == made[1].tensors.keys()
    assert all(torch.equal(made[0].tensors[name], made[1].tensors[name]) for name in made[0].tensors)


def changed(path: str, change: str) -> None:
    """A checkpoint that our own modules do not take, or take as it is."""
    file, config = Path(path) / "model.safetensors", Path(path) / "config.json"
    state = load_file(file)
    if change == "names of old":
        state = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in state.items()}
    elif change == "with a prefix":
        state = {f"bert.{n}": t for n, t in state.items()} | {"cls.predictions.bias": torch.zeros(3)}
    elif change == "in 16 bits":
        state = {n: t.half() for n, t in state.items()}
    elif change == "in two files":
        save_file({"other": torch.zeros(1)}, file.with_name("other.safetensors"))
    else:
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"position_embedding_type": "relative_key"}))
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("change", ["with a prefix", "in 16 bits"])
def test_checkpoints_as_they_lie_about(change, tmp_path):
    changed(path := tiny.save("bert", tmp_path), change)
    light, whole = both(path)
    assert is_own(light.model)
    assert light.ref == whole.ref
    assert light.dtype == torch.float32


@pytest.mark.parametrize("change", ["names of old", "in two files", "relative positions"])
def test_what_is_otherwise_is_left_to_transformers(change, tmp_path):
    changed(path := tiny.save("bert", tmp_path), change)
    assert not is_own(Encoder(path, light=True).model)


@pytest.mark.parametrize("family", ["distilbert", "electra", "mpnet", "modernbert"])
def test_so_are_other_families(family, tmp_path):
    assert not is_own(Encoder(tiny.save(family, tmp_path), light=True).model)
