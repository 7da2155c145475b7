"""The encoder: packed rows equal transformers' own output, gradients flow, weights are known by their hash."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoTokenizer,
    CanineConfig,
    Data2VecTextConfig,
    GPT2Config,
    LayoutLMConfig,
    LlamaConfig,
    MobileBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

from bertology_serve.encoder import forward_context
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.batch import pack
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.linear import available
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import InputError, NotFound, SpecError, Unsupported
from bertology_serve.families import compat
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
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
    monkeypatch.setattr(compat, "connect", lambda *_: False)
    encoder = Encoder.load(str(tmp_path))
    assert not encoder.packs
    for one, other in zip(packed, run(encoder, sequences, padded=True), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_padded_mixed_batch_equals_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [[Lora()], [Bitfit()], [Adapter(width=4)], [Adapter("pfeiffer", 4)], [Prompt(3)]]
    task = TaskSpec("embedding", max_length=32, pooling="mean", head="none")
    encoder = tiny.encoder("roberta", tmp_path)
    deltas = [tiny.delta(encoder, f"d{i}", part, task, i) for i, part in enumerate(specs)]
    prefix = tiny.delta(encoder, "prefix", [Prefix(2)], task)
    requests = [Request(f"d{i}", {"text": "the cat was good " * (i + 1)}) for i in range(5)]

    def answers(loaded: Encoder) -> torch.Tensor:
        pipeline = Pipeline(loaded)
        for delta in deltas:
            pipeline.add(delta)
        return torch.tensor([prediction.answer["embedding"] for prediction in pipeline.answer(requests)])

    expected = answers(encoder)
    monkeypatch.setattr(compat, "connect", lambda *_: False)
    padded = Encoder.load(str(tmp_path))
    torch.testing.assert_close(answers(padded), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(Unsupported, match="takes no prefix"):
        Pipeline(padded).add(prefix)


def save(config: Any, directory: Path) -> str:
    """A small random model of a configuration with BERT's tokenizer beside it."""
    torch.manual_seed(0)
    AutoModel.from_config(config, trust_remote_code=False).save_pretrained(directory)
    tiny.tokenizer("bert").save_pretrained(directory)
    return str(directory)


SIZE = tiny._SIZE | tiny._FFN | {"pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LayoutLMConfig(**SIZE), r"layoutlm.*does not run on token ids alone \(TypeError"),
        (CanineConfig(**SIZE | {"max_position_embeddings": 64}), "canine"),
        (LlamaConfig(**SIZE), "llama the first token does not see the last, as in a decoder"),
        (MobileBertConfig(**SIZE | {"embedding_size": 32}), "MobileBertLayer has two up projections, intermediate"),
        (AlbertConfig(**SIZE, num_hidden_groups=3, inner_group_num=2), "AlbertLayerGroup has two up projections"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_a_family_that_is_built_otherwise_is_refused_by_name(config: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=why) as refused:
        Encoder.load(save(config, tmp_path))
    assert "expected a BERT-like encoder: bert, roberta" in str(refused.value)


@pytest.mark.parametrize("padding", [0, 1])
def test_positions_begin_behind_the_row_of_the_padding(padding: int, tmp_path: Path) -> None:
    """Data2VecText numbers its positions as RoBERTa does, though nothing here knows its name."""
    encoder = Encoder.load(save(Data2VecTextConfig(**SIZE | {"pad_token_id": padding}), tmp_path))
    assert encoder.packs
    assert encoder.anatomy.position_offset == padding + 1
    assert encoder.anatomy.max_tokens == SIZE["max_position_embeddings"] - padding - 1


def test_layers_that_share_their_weights_are_one(tmp_path: Path) -> None:
    """ALBERT runs one layer's weights three times: LoRA, as in peft, is the same in each; a prefix would not be."""
    encoder = Encoder.load(save(AlbertConfig(**SIZE, embedding_size=24), tmp_path))
    assert encoder.packs
    assert encoder.anatomy.layers == 1
    task = TaskSpec("embedding", max_length=32, pooling="mean", head="none")
    pipeline = Pipeline(encoder)
    pipeline.add(tiny.delta(encoder, "lora", [Lora()], task))
    with pytest.raises(
        Unsupported, match=r"delta 'prefix': albert runs 1 layer\(s\) of weights 3 times; a prefix would need"
    ):
        pipeline.add(tiny.delta(encoder, "prefix", [Prefix(2)], task))
    sequence = pack(encodings((5,)), [BARE], encoder.anatomy, encoder.device)
    bank = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device)
    with pytest.raises(Unsupported, match="the layers' hidden states"):
        encoder.layers(sequence, bank)


def test_pairs_have_one_type_where_the_model_has_one(tmp_path: Path) -> None:
    """klue/roberta and others: a single row of token types beside BERT's tokenizer, which gives two."""
    encoder = Encoder.load(save(RobertaConfig(**SIZE, type_vocab_size=1), tmp_path))
    assert "token_type_ids" not in encoder.tokenizer.model_input_names
    task = TaskSpec("classification", ("a", "b"), max_length=32)
    pipeline = Pipeline(encoder)
    pipeline.add(tiny.delta(encoder, "pairs", [Lora()], task))
    record = {"text": "the cat was good", "text_pair": "a dog"}
    assert set(pipeline.prepare(Request("pairs", record)).encodings[0].types) == {0}
    (answer,) = pipeline.answer([Request("pairs", record)])
    assert answer.answer["label"] in ("a", "b")
    encoder.tokenizer.save_pretrained(tmp_path / "written")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path / "written").model_input_names


def test_loading_says_whether_rows_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bertology_serve")
    assert tiny.encoder("bert", tmp_path).packing == "packed through transformers' attention interface"
    assert caplog.messages == [f"{tmp_path} (bert) is packed through transformers' attention interface"]
    assert tiny.encoder("mpnet", tmp_path / "own").packing == "packed through an attention of our own"
    caplog.clear()
    monkeypatch.setattr(forward_context, "packed_attention", lambda query, *_, **__: query.flatten(1) * 0)
    packing = Encoder.load(str(tmp_path)).packing
    assert packing.startswith("padded: packed rows differ from the model's own by ")
    assert caplog.messages == [f"{tmp_path} (bert) is {packing}"]
    assert caplog.records[0].levelname == "WARNING"
    monkeypatch.setattr(compat, "connect", lambda *_: False)
    assert "does not go through the interface of transformers" in Encoder.load(str(tmp_path)).packing


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    tiny.save("bert", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "their_own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(Unsupported, match="brings code of its own, which is never run"):
        Encoder.load(str(tmp_path))


def test_a_model_that_answers_otherwise_when_packed_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that took the registered attention's name and ignored it would attend across sequences."""
    tiny.save("bert", tmp_path)
    monkeypatch.setattr(forward_context, "packed_attention", lambda query, *_, **__: query.flatten(1) * 0)
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
    assert weights_hash({"scalar": torch.tensor(1.0)}) != weights_hash({"scalar": torch.tensor(2.0)})
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


@pytest.mark.skipif(not available(torch.bfloat16), reason="this processor's oneDNN has no bfloat16")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_in_bfloat16_are_near_in_every_family(family: str, tmp_path: Path) -> None:
    encoder = tiny.encoder(family, tmp_path)
    batch, pools = (
        encoder.pack(encodings((3, 12, 7)), [BARE] * 3),
        DeltaBank(encoder.anatomy, encoder.dtype, encoder.device),
    )
    exact = encoder.run(batch, pools)
    encoder.round()
    for laid_out in (False, True):
        assert encoder.prepack(laid_out) == encoder.prepacked == laid_out
        rows = encoder.run(batch, pools)
        assert rows.dtype == torch.bfloat16
        assert 1e-5 < (rows.float() - exact).norm() / exact.norm() < 0.05


def test_an_encoder_in_training_is_not_rounded(tmp_path: Path) -> None:
    encoder = tiny.encoder("bert", tmp_path)
    encoder.model.requires_grad_(True)
    with pytest.raises(SpecError, match="is being trained"):
        encoder.round()
    assert encoder.dtype == torch.float32


def test_encoders_that_load_at_once_leave_transformers_as_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    """transformers replaces functions of its classes while it loads; two at once would leave every model untied."""
    tiny.save("bert", tmp_path / "base")
    tied, at_once, read = PreTrainedModel.tie_weights, list[int](), AutoModel.from_pretrained

    def counted(*given: Any, **more: Any) -> Any:
        at_once.append(1)
        time.sleep(0.02)
        assert len(at_once) == 1
        found = read(*given, **more)
        at_once.pop()
        return found

    monkeypatch.setattr(AutoModel, "from_pretrained", counted)
    with ThreadPoolExecutor(3) as pool:
        for loaded in pool.map(Encoder, [str(tmp_path / "base")] * 6):
            assert loaded.hidden > 0
    assert PreTrainedModel.tie_weights is tied
