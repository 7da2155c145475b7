"""The encoder: packed rows equal transformers' own output, gradients flow, weights are known by their hash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, GPT2Config

from bertology_serve.deltas.bitfit import BitfitSpec
from bertology_serve.deltas.bottleneck import AdapterSpec
from bertology_serve.deltas.lora import LoraSpec
from bertology_serve.deltas.prefix import PrefixSpec
from bertology_serve.deltas.prompt import PromptSpec
from bertology_serve.encoder import families
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.packing import pack
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import InputError, NotFound, Unsupported
from bertology_serve.tasks.spec import Encoding, TaskSpec
from tests import tiny


def encodings(lengths: tuple[int, ...], seed: int = 0) -> list[Encoding]:
    """Random sequences of those lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 30, (n,), generator=generator).tolist() for n in lengths]
    return [Encoding(tuple(row), (0,) * len(row)) for row in ids]


def run(encoder: Encoder, sequences: list[Encoding], padded: bool = False) -> list[torch.Tensor]:
    """The rows of each sequence, in the order given."""
    bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
    batch = pack(sequences, [BARE] * len(sequences), encoder.anatomy, encoder.device, padded)
    with torch.inference_mode():
        hidden = encoder.run(batch, bank)
    rows = [hidden[start : start + n] for start, n in zip(batch.starts, batch.lengths, strict=True)]
    return [rows[batch.order.index(i)] for i in range(len(sequences))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_rows_equal_transformers_own(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    own = AutoModel.from_pretrained(tmp_path).eval()
    assert encoder.packs
    sequences = encodings((5, 1, 9, 5, 40, 2))
    for sequence, rows in zip(sequences, run(encoder, sequences), strict=True):
        with torch.inference_mode():
            expected = own(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
        torch.testing.assert_close(rows, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_equal_transformers_hidden_states(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    own = AutoModel.from_pretrained(tmp_path).eval()
    sequence = encodings((9,))
    batch = pack(sequence, [BARE], encoder.anatomy, encoder.device)
    with torch.inference_mode():
        found = encoder.layers(batch, DeltaBank(encoder.anatomy, encoder.dtype, encoder.device))
        expected = own(input_ids=torch.tensor([sequence[0].ids]), output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for rows, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, whole[0], atol=2e-6, rtol=1e-5)


def test_a_family_that_cannot_be_packed_is_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = encodings((5, 1, 9, 5, 40, 2))
    packed = run(tiny.encoder("bert", tmp_path), sequences)
    monkeypatch.setattr(families, "prepare", lambda *_: False)
    encoder = Encoder.load(str(tmp_path))
    assert not encoder.packs
    for one, other in zip(packed, run(encoder, sequences, padded=True), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_padded_mixed_batch_equals_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [[LoraSpec()], [BitfitSpec()], [AdapterSpec(width=4)], [AdapterSpec("pfeiffer", 4)], [PromptSpec(3)]]
    task = TaskSpec("embedding", max_length=32, pooling="mean", head="none")
    encoder = tiny.encoder("roberta", tmp_path)
    deltas = [tiny.delta(encoder, f"d{i}", part, task, i) for i, part in enumerate(specs)]
    prefix = tiny.delta(encoder, "prefix", [PrefixSpec(2)], task)
    requests = [Request(f"d{i}", {"text": "the cat was good " * (i + 1)}) for i in range(5)]

    def answers(loaded: Encoder) -> torch.Tensor:
        pipeline = Pipeline(loaded)
        for delta in deltas:
            pipeline.add(delta)
        return torch.tensor([prediction.answer["embedding"] for prediction in pipeline.answer(requests)])

    expected = answers(encoder)
    monkeypatch.setattr(families, "prepare", lambda *_: False)
    padded = Encoder.load(str(tmp_path))
    torch.testing.assert_close(answers(padded), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(Unsupported, match="takes no prefix"):
        Pipeline(padded).add(prefix)


def test_a_model_that_answers_otherwise_when_packed_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that took the registered attention's name and ignored it would attend across sequences."""
    tiny.save("bert", tmp_path)
    monkeypatch.setattr(families, "packed_attention", lambda query, *_, **__: query.flatten(1) * 0)
    encoder = Encoder.load(str(tmp_path))
    assert not encoder.packs


def test_prepacked_linears_give_the_same_rows(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    sequences = encodings((5, 9, 40))
    plain = run(encoder, sequences)
    assert encoder.prepack(True)
    for one, other in zip(plain, run(encoder, sequences), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_the_hash_tells_weights_apart(tmp_path: Path) -> None:
    first = tiny.encoder("bert", tmp_path / "a", seed=0)
    again = tiny.encoder("bert", tmp_path / "b", seed=0)
    other = tiny.encoder("bert", tmp_path / "c", seed=1)
    assert first.ref.sha256 == again.ref.sha256 != other.ref.sha256
    assert first.fresh().ref.sha256 == first.ref.sha256


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no encoder"):
        Encoder.load(str(tmp_path / "nothing"))
    GPT2Config(n_layer=1, n_head=2, n_embd=8).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        Encoder.load(str(tmp_path))


def test_minilm_is_the_real_one(minilm: Encoder) -> None:
    assert minilm.anatomy.layers == 6
    assert minilm.max_tokens == 512
    assert set(minilm.base_head) == {"pooler.dense.weight", "pooler.dense.bias"}
