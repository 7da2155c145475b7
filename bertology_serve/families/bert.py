"""BERT and the families that differ from it by their heads alone: RoBERTa, DistilBERT, ELECTRA, ALBERT and their kin.

All of them go through transformers' attention interface, on which rows travel packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from bertology_serve.families.family import (
    Dense,
    Family,
    HeadShape,
    bert_words,
    classifier,
    dense_out_proj,
    hidden_first,
    pooler,
    roberta_words,
    spans,
    word_scores,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bertology_serve.families.compat import HiddenModel


def _build(prefix: str, padded_positions: bool, config: PretrainedConfig) -> HiddenModel:
    import torch

    from bertology_serve.families.bert_layers import BertLayers

    with torch.device("meta"):
        return cast("HiddenModel", BertLayers(config, prefix, padded_positions))


_as_bert, _as_roberta = partial(_build, "bert", False), partial(_build, "roberta", True)


def _dropped_spans(shape: HeadShape) -> tuple[Dense, ...]:
    return (Dense("qa_outputs", shape.hidden, 2, dropout=True),)


_BERT = Family("bert", pooler, pooler, classifier, spans, bert_words)
_ROBERTA = Family("roberta", dense_out_proj("tanh"), pooler, classifier, spans, roberta_words, token_types=0)
_first = hidden_first("pre_classifier", "relu")
_distilbert_words = word_scores("vocab_transform", "vocab_layer_norm", "vocab_projector", "gelu", "activation")
_DISTILBERT = Family("distilbert", _first, _first, classifier, _dropped_spans, _distilbert_words, emitted=True)
_ELECTRA_WORDS = "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"
_ELECTRA = Family(
    "electra",
    dense_out_proj("gelu"),
    hidden_first("sequence_summary.summary", "gelu", "summary_activation"),
    classifier,
    spans,
    word_scores(*_ELECTRA_WORDS, "gelu", eps="layer_norm_eps"),
    choice_reads="summary_type",
    emitted=True,
    token_types=2,
    peft_prefix=True,
    adapterhub=True,
)
_albert_pooler = hidden_first("{prefix}.pooler", "tanh", base_name="pooler")
_ALBERT_WORDS = "predictions.dense", "predictions.LayerNorm", "predictions", "gelu_new", "hidden_act", "layer_norm_eps"
_ALBERT = Family("albert", _albert_pooler, _albert_pooler, classifier, spans, word_scores(*_ALBERT_WORDS))


def rows() -> Iterator[Family]:
    """All of them."""
    yield replace(_BERT, build=_as_bert, emitted=True, token_types=2, peft_prefix=True, adapterhub=True)
    for name in ("ernie", "megatron-bert", "roc_bert"):
        yield replace(_BERT, name=name)
    yield replace(_BERT, name="rembert", words=None)
    for name in ("gte", "nomic_bert"):
        yield replace(_BERT, name=name, choice=None, answers=None, words=None)
    for name in ("roberta", "xlm-roberta"):
        yield replace(_ROBERTA, name=name, build=_as_roberta, emitted=True, peft_prefix=True, adapterhub=True)
    yield replace(_ROBERTA, name="camembert", build=_as_roberta, emitted=True, peft_prefix=True)
    yield replace(_ROBERTA, name="xlm-roberta-xl", peft_prefix=True)
    yield replace(_ROBERTA, name="xmod")
    for name in ("data2vec-text", "roberta-prelayernorm"):
        yield replace(_ROBERTA, name=name, choice=None)
    yield replace(_ROBERTA, name="jina_embeddings_v3", choice=None, words=None)
    yield from (_DISTILBERT, _ELECTRA, _ALBERT)
    roformer = Family("roformer", dense_out_proj("gelu", "hidden_act"), None, classifier, spans)
    yield roformer
    yield replace(roformer, name="big_bird", choice=_albert_pooler, answers=None)
    # Longformer's other heads read tokens of global attention, EuroBERT's the mean of every logit.
    yield from (Family(name, tokens=classifier) for name in ("eurobert", "longformer"))
