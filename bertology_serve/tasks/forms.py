"""The form that HuggingFace's task models give the head, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bertology_serve.errors import Unsupported, nearest
from bertology_serve.tasks.spec import MULTIPLE_CHOICE, QUESTION_ANSWERING, TOKEN_CLASSIFICATION, TaskSpec

# The families whose heads are known, by the form of their sequence head. What is not here is refused.
POOLER = ("bert", "ernie", "gte", "megatron-bert", "nomic_bert", "rembert", "roc_bert")
ROBERTA_LIKE = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "jina_embeddings_v3",
    "roberta-prelayernorm", "xmod",
)  # fmt: skip
DENSE_OUT_PROJ = ("big_bird", "electra", "mpnet", "roformer", *ROBERTA_LIKE)
DEBERTA_LIKE = ("deberta", "deberta-v2")
FAMILIES = ("albert", "distilbert", "modernbert", *POOLER, *DENSE_OUT_PROJ, *DEBERTA_LIKE)
# Those of them that transformers gives another head for these tasks, or none.
NO_ANSWERS = ("big_bird", "gte", "nomic_bert")
NO_CHOICE = (
    "data2vec-text", "deberta", "gte", "jina_embeddings_v3", "nomic_bert", "roberta-prelayernorm", "roformer"
)  # fmt: skip
# Known for tags only: Longformer's other heads read tokens of global attention, EuroBERT's the mean of every logit.
TAGS_ONLY = ("eurobert", "longformer")
MLP_WIDTH, MLP_STD = 2048, 0.005


@dataclass(frozen=True)
class Dense:
    """One layer of a head: ``norm(activation(x Wᵀ + b))`` for rows x [n, inputs] -> [n, outputs].

    ``path`` and ``norm`` are the names of the linear and of the LayerNorm after it in HuggingFace's task model
    (``classifier.out_proj``, ``bert.pooler.dense``). ``base_name`` and ``base_norm`` are their names in the headless
    base model, where its checkpoint may hold them. ``dropout`` says whether the layer's input is dropped in training,
    ``std`` how far its weights are drawn from zero.
    """

    path: str
    inputs: int
    outputs: int
    activation: str | None = None
    norm: str | None = None
    bias: bool = True
    base_name: str | None = None
    base_norm: str | None = None
    dropout: bool = False
    norm_eps: float = 1e-5
    norm_bias: bool = True
    std: float = 0.02


def head_form(family: str, prefix: str, spec: TaskSpec, hidden: int, options: Mapping[str, Any]) -> tuple[Dense, ...]:
    """The layers of a head, first to last; empty for embeddings.

    ``family`` is the model type of the configuration ("bert", "deberta-v2"), ``prefix`` the name of the encoder in
    HuggingFace's task models ("bert", "roberta", "model"), ``hidden`` is H, ``options`` are values of the model's
    configuration (``classifier_activation``, ``norm_eps`` ...; what is missing takes its default there). Multiple
    choice and regression read the pooled row as classification does, with C = 1. Raises Unsupported where the form
    that HuggingFace gives the family is not known.
    """
    if spec.head == "none":
        return ()
    if spec.head == "linear":
        return (Dense("classifier", hidden, spec.outputs, dropout=True),)
    if spec.head == "mlp":
        return _mlp(spec, hidden)
    _check_known(family, spec.kind)
    if family == "modernbert":
        return _modernbert(spec, hidden, options)
    if spec.kind == QUESTION_ANSWERING:
        return (Dense("qa_outputs", hidden, 2, dropout=family == "distilbert"),)
    if spec.per_token:
        return (Dense("classifier", hidden, spec.outputs, dropout=True),)
    return _pooled(family, prefix, spec, hidden, options)


def _pooled(family: str, prefix: str, spec: TaskSpec, hidden: int, options: Mapping[str, Any]) -> tuple[Dense, ...]:
    """One answer for a sequence, every family but ModernBERT."""
    choice = spec.kind == MULTIPLE_CHOICE
    classifier = Dense("classifier", hidden, spec.outputs, dropout=True)
    if family == "albert" or (choice and family == "big_bird"):
        return Dense(f"{prefix}.pooler", hidden, hidden, "tanh", base_name="pooler"), classifier
    if family in POOLER or (choice and family in (*ROBERTA_LIKE, "mpnet")):
        return Dense(f"{prefix}.pooler.dense", hidden, hidden, "tanh", base_name="pooler.dense"), classifier
    if choice and family == "electra":
        activation = options.get("summary_activation", "gelu")
        return Dense("sequence_summary.summary", hidden, hidden, activation), classifier
    if family in ("big_bird", "roformer"):
        return _dense_out_proj(spec, hidden, options.get("hidden_act", "gelu"))
    if family in DENSE_OUT_PROJ:
        return _dense_out_proj(spec, hidden, "gelu" if family == "electra" else "tanh")
    if family in DEBERTA_LIKE:
        return Dense("pooler.dense", hidden, hidden, options.get("pooler_hidden_act", "gelu")), classifier
    return Dense("pre_classifier", hidden, hidden, "relu"), classifier


def _check_known(family: str, kind: str) -> None:
    """Raises Unsupported for a family whose head for that task is not computed here as transformers computes it."""
    lacking = {QUESTION_ANSWERING: NO_ANSWERS, MULTIPLE_CHOICE: NO_CHOICE}.get(kind, ())
    known = [*(TAGS_ONLY if kind == TOKEN_CLASSIFICATION else ()), *(name for name in FAMILIES if name not in lacking)]
    if family not in known:
        raise Unsupported(
            f"transformers' head of {family} for {kind} is not known here, so that answers could differ; "
            f"train with --head linear, or take another encoder; {nearest(family, known)}"
        )


def head_pooling(family: str, kind: str, options: Mapping[str, Any]) -> str:
    """Which rows the head of HuggingFace's task model reads: ``cls``, ``mean``, or what the configuration says."""
    if kind in (TOKEN_CLASSIFICATION, QUESTION_ANSWERING):
        return "cls"
    if family == "modernbert":
        return str(options.get("classifier_pooling", "cls"))
    if family == "electra" and kind == MULTIPLE_CHOICE and options.get("summary_type", "first") != "first":
        return str(options["summary_type"])
    return "cls"


def _dense_out_proj(spec: TaskSpec, hidden: int, activation: str) -> tuple[Dense, ...]:
    """RoBERTa's classification head: dense, activation, out_proj, dropout before both."""
    dense = Dense("classifier.dense", hidden, hidden, activation, dropout=True)
    return dense, Dense("classifier.out_proj", hidden, spec.outputs, dropout=True)


def _mlp(spec: TaskSpec, hidden: int) -> tuple[Dense, ...]:
    """The head of EH-FT's authors (Yang et al. 2022, arXiv 2210.16771): H -> 2048 -> C, weights from N(0, 0.005²)."""
    first = Dense("classifier.dense", hidden, MLP_WIDTH, "relu", std=MLP_STD)
    return first, Dense("classifier.out_proj", MLP_WIDTH, spec.outputs, std=MLP_STD)


def _modernbert(spec: TaskSpec, hidden: int, options: Mapping[str, Any]) -> tuple[Dense, ...]:
    """ModernBERT's prediction head, the same for rows and for sequences."""
    head = Dense(
        "head.dense",
        hidden,
        hidden,
        options.get("classifier_activation", "gelu"),
        norm="head.norm",
        bias=bool(options.get("classifier_bias", False)),
        base_name="head.dense",
        base_norm="head.norm",
        norm_eps=float(options.get("norm_eps", 1e-5)),
        norm_bias=bool(options.get("norm_bias", False)),
    )
    return head, Dense("classifier", hidden, spec.outputs, dropout=True)
