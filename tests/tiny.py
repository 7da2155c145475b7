"""Small random encoders of every family, with the real configuration classes, and random deltas for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.tasks.spec import TaskSpec

TEXT = (
    "the a cat dog house river bank money good bad great film was is not very Paris London Ada met went to in on "
    "who where what when answer question red blue green cold warm early late . , ? !"
)
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SIZE = {"vocab_size": len(WORDS) + len(SPECIAL), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_FFN = {"intermediate_size": 48, "max_position_embeddings": 66}

_OFFSET = _FFN | {"max_position_embeddings": 70}

CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**_SIZE, **_FFN),
    "roberta": lambda: RobertaConfig(**_SIZE, **_FFN | {"max_position_embeddings": 70}, pad_token_id=1),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=_SIZE["vocab_size"], dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=66
    ),
    "electra": lambda: ElectraConfig(**_SIZE, **_FFN, embedding_size=24),
    "modernbert": lambda: ModernBertConfig(
        **_SIZE, **_FFN, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, cls_token_id=2, sep_token_id=3
    ),
    "mpnet": lambda: MPNetConfig(**_SIZE, **_FFN | {"max_position_embeddings": 70}, pad_token_id=1),
    # the switches of microsoft/deberta-v3-base
    "deberta-v3": lambda: DebertaV2Config(
        **_SIZE, **_FFN, relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, max_relative_positions=-1,
        pooler_hidden_act="gelu", pooler_hidden_size=32, pooler_dropout=0.0,
    ),
    # microsoft/deberta-v2-xxlarge has a convolution as well
    "deberta-v2": lambda: DebertaV2Config(
        **_SIZE, **_FFN, relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, conv_kernel_size=3,
        conv_act="gelu", pooler_hidden_act="gelu", pooler_hidden_size=32, pooler_dropout=0.0,
    ),
    # position projections of their own, absolute positions too
    "deberta-own": lambda: DebertaV2Config(
        **_SIZE, **_FFN, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=True,
        type_vocab_size=2, pooler_hidden_size=32,
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
# Families whose head is known too; they go through the same code, and a few tests run them all.
OTHERS: dict[str, Any] = {
    family: functools.partial(AutoConfig.for_model, family, **_SIZE, **_FFN, **more)
    for family, more in {
        "albert": {"embedding_size": 24}, "big_bird": {"attention_type": "original_full"}, "ernie": {},
        "gte": {"type_vocab_size": 2, "pad_token_id": 0}, "megatron-bert": {},
        "jina_embeddings_v3": {"pad_token_id": 0}, "nomic_bert": {"type_vocab_size": 2, "pad_token_id": 0},
        "rembert": {"input_embedding_size": 24}, "roc_bert": {}, "roformer": {"embedding_size": 24},
    }.items()
    if family in CONFIG_MAPPING  # transformers gained some of them lately
}  # fmt: skip
# Families without a head of their own that is known here.
HEADLESS: dict[str, Any] = {
    family: functools.partial(AutoConfig.for_model, name, **_SIZE | {"pad_token_id": 0}, **_FFN, **more)
    for family, (name, more) in {
        "eurobert": ("eurobert", {"num_key_value_heads": 4, "bos_token_id": 2, "eos_token_id": 3}),
        "eurobert-grouped": ("eurobert", {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}),
        "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}),
    }.items()
    if name in CONFIG_MAPPING
}  # fmt: skip


def tokenizer(family: str = "bert") -> PreTrainedTokenizerFast:
    """A lower-case word tokenizer with [CLS] text [SEP] pair [SEP]."""
    specials = (
        ["[UNK]", "[PAD]", *SPECIAL[2:]] if family in ("roberta", "mpnet", "camembert", "xlm-roberta") else SPECIAL
    )
    vocabulary = {word: i for i, word in enumerate([*specials, *dict.fromkeys(w.lower() for w in WORDS)])}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )  # fmt: skip
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if family in ("bert", "electra") else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64, model_input_names=names,
    )  # fmt: skip


def save(family: str, directory: Path, seed: int = 0) -> str:
    """Writes a small random encoder and its tokenizer, as a checkpoint would lie on disk; returns the path."""
    torch.manual_seed(seed)
    model = AutoModel.from_config((CONFIGS | OTHERS | HEADLESS)[family]())
    with torch.no_grad():  # biases and norms away from their trivial start
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    tokenizer(family).save_pretrained(directory)
    return str(directory)


def encoder(family: str, directory: Path, seed: int = 0) -> Encoder:
    """A small random encoder, loaded from disk."""
    return Encoder.load(save(family, directory, seed))


def delta(loaded: Encoder, name: str, specs: Sequence[Any], task: TaskSpec, seed: int = 0, size: float = 0.1) -> Delta:
    """A delta whose tensors are all random, head included."""
    live = TrainableDelta(loaded, specs, task, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return live.freeze(name, version="1")
