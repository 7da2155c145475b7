"""Deltas with random tensors for small encoders of every family, made without any encoder weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.encoder.anatomy import empty_model, find_anatomy
from bertology_serve.kinds import kinds
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.kinds.vera import Vera
from bertology_serve.tasks.heads import Head, head_form
from bertology_serve.tasks.spec import TaskSpec
from tests import tiny

FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert", "mpnet", "deberta-v3")
CLASSES = TaskSpec("classification", ("bad", "good", "none"), 32)
TAGS = TaskSpec("token-classification", ("O", "B-X", "I-X"), 32)
ANSWERS = TaskSpec("question-answering", max_length=32, stride=8)
CHOICE = TaskSpec("multiple-choice", max_length=32)
SCORE = TaskSpec("regression", max_length=32)
FLAGS = TaskSpec("multi-label", ("bad", "good", "long"), 32, thresholds=(0.5, 0.25, 0.9))
VECTORS = TaskSpec("embedding", max_length=32, pooling="mean", head="none", normalize=False)
TASKS = {task.kind: task for task in (CLASSES, TAGS, ANSWERS, CHOICE, SCORE, FLAGS, VECTORS)}

PEFT_PROMPT = Prompt(3, "before_cls", "shifted", "first_row")
PEFT_PREFIX = Prefix(2, "shifted")
SPECS: dict[str, tuple[Any, ...]] = {
    "probe": (),
    "lora": (Lora(rank=3),),
    "lora-all": (Lora(("query", "key", "value", "output", "up", "down"), rank=2, rslora=True, dropout=0.1),),
    "lora-one-layer": (Lora(("key",), rank=2, alpha=3.5, layers=(1,)),),
    "bitfit": (Bitfit(),),
    "bitfit-attention": (Bitfit("attention"),),
    "houlsby": (Adapter(width=5),),
    "pfeiffer": (Adapter("pfeiffer", width=4, drop_lowest=1),),
    "bitfit-upper": (Bitfit(layers=(1, 2)),),
    "bitfit-attention-upper": (Bitfit("attention", layers=(2,)),),
    "houlsby-some": (Adapter(width=5, layers=(0, 2)),),
    "ia3-upper": (Ia3(layers=(1, 2)),),
    "norms-upper": (Norms(layers=(1, 2)),),
    "ia3": (Ia3(),),
    "ia3-some": (Ia3(("query", "value", "up"), ()),),
    "norms": (Norms(),),
    "vera": (Vera(rank=6),),
    "vera-key": (Vera(("value", "down"), rank=4, key=3, save_projection=False, layers=(0, 2)),),
    "prompt": (Prompt(3),),
    "prompt-peft": (PEFT_PROMPT,),
    "prefix": (Prefix(4),),
    "prefix-peft": (PEFT_PREFIX,),
    "all": (Lora(rank=2), Bitfit(), Adapter("pfeiffer", 3), PEFT_PROMPT, PEFT_PREFIX),
}


@functools.cache
def config(family: str) -> Any:
    """The configuration of a small encoder."""
    return tiny.CONFIGS[family]()


def options(family: str) -> dict[str, Any]:
    """The same as a table."""
    values: dict[str, Any] = config(family).to_dict()
    return values


@functools.cache
def anatomy(family: str) -> Anatomy:
    """The anatomy of a small encoder."""
    return find_anatomy(empty_model(config(family)))


def base(family: str) -> BaseRef:
    """An encoder's reference; no weights have this hash."""
    return BaseRef(f"tiny-{family}", "ab" * 32, anatomy(family).family)


def delta(family: str, specs: Sequence[Any], task: TaskSpec = CLASSES, name: str = "sample", seed: int = 0) -> Delta:
    """A delta of which every tensor is random."""
    generator = torch.Generator().manual_seed(seed)
    body = anatomy(family)

    def drawn(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}

    form = head_form(body.family, body.prefix, task, body.hidden, options(family))
    tensors = drawn(kinds.init(specs, body, None))
    return Delta(name, base(family), task, tuple(specs), tensors, drawn(Head.build(form, {}).own_tensors()))


def same(one: Delta, other: Delta) -> bool:
    """Whether two deltas agree in everything but their version, tensors bit for bit."""
    groups = ((one.tensors, other.tensors), (one.head, other.head), (one.weights, other.weights))
    plain = ("name", "base", "task", "specs", "metrics", "provenance")
    return all(getattr(one, field) == getattr(other, field) for field in plain) and all(
        a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items()) for a, b in groups
    )
