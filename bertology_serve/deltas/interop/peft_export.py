"""The ``adapter_config.json`` of a delta, for those deltas of which peft computes the same function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.interop.peft_tensors import ia3_config, is_beft, modules
from bertology_serve.deltas.layout import MODEL_ROOT, as_peft_does
from bertology_serve.deltas.pruning import PRUNED
from bertology_serve.families import FAMILIES, family_named
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import head_pooling
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    EMBEDDING,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
    TaskSpec,
)

# Multiple choice has no task type in peft: its plain PeftModel runs the task model, the head listed by name.
TASK_TYPES: dict[str, str | None] = {
    CLASSIFICATION: "SEQ_CLS",
    REGRESSION: "SEQ_CLS",
    TOKEN_CLASSIFICATION: "TOKEN_CLS",
    QUESTION_ANSWERING: "QUESTION_ANS",
    EMBEDDING: "FEATURE_EXTRACTION",
    MULTIPLE_CHOICE: None,
}
PREFIX_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.peft_prefix)


def module_root(task: TaskSpec, anatomy: Anatomy) -> str:
    """What encoder modules' names begin with in the task's HuggingFace model; empty for the bare encoder."""
    return "" if task.kind == EMBEDDING or not anatomy.prefix else f"{anatomy.prefix}."


def tensor_root(task: TaskSpec, anatomy: Anatomy) -> str:
    """What the names of encoder tensors begin with on disk."""
    return MODEL_ROOT + module_root(task, anatomy)


def drops_types(task: TaskSpec, family: str, options: Mapping[str, Any]) -> bool:
    """Whether peft's model for a task silently drops the token types that the family's pairs carry.

    ``PeftModelForQuestionAnswering.forward`` (0.21.2) takes ``token_type_ids`` and passes them to nobody.
    """
    own = family_named(family).token_types
    types = int(options.get("type_vocab_size") or (0 if options else own or 0))
    return task.kind == QUESTION_ANSWERING and task.token_types and types > 1 and own != 0


def obstacle(delta: Delta, anatomy: Anatomy, options: Mapping[str, Any]) -> str:
    """Why peft does not compute the same function; empty where it does. ``options`` are the encoder's configuration."""
    if options.get(PRUNED):
        return "peft cannot load the encoder, which was pruned"
    if delta.weights or len(delta.specs) != 1:
        return f"peft has no single method for {', '.join(delta.kinds)}"
    return _method_obstacle(delta, anatomy, options) or _head_obstacle(delta.task, anatomy.family, options)


def adapter_config(delta: Delta, anatomy: Anatomy, options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``adapter_config.json``; only for deltas without an ``obstacle``.

    Where peft's model for the task drops token types, none is named: its plain ``PeftModel`` hands them on.
    """
    plain = drops_types(delta.task, anatomy.family, options)
    return {
        "base_model_name_or_path": delta.base.name,
        "inference_mode": True,
        "modules_to_save": modules_to_save(delta.head) or None,
        "task_type": None if plain else TASK_TYPES[delta.task.kind],
        **_method(delta, anatomy),
    }


def modules_to_save(head: Iterable[str]) -> list[str]:
    """The modules that own a head's tensors. peft wraps ``classifier`` as a whole, so its parts are not named."""
    owners = (name.rpartition(".")[0] for name in head)
    return list(dict.fromkeys("classifier" if owner.startswith("classifier.") else owner for owner in owners))


def _method_obstacle(delta: Delta, anatomy: Anatomy, options: Mapping[str, Any]) -> str:
    spec, task, family = delta.specs[0], delta.task, anatomy.family
    if isinstance(spec, Lora | Ia3):
        return ""
    if isinstance(spec, Norms):
        return "peft stores LayerNorms whole, not as differences"
    if isinstance(spec, Bitfit):
        return "" if is_beft(spec, anatomy) else "peft changes the biases of linear projections only (BEFT)"
    if as_peft_does(delta.specs) is None:
        return f"peft computes no {delta.kinds[0]} in this way"
    if isinstance(spec, Prompt) and TASK_TYPES[task.kind] != "SEQ_CLS":
        return f"peft answers {task.kind} with the prompt's rows among the text's"
    if isinstance(spec, Prefix) and (family not in PREFIX_FAMILIES or task.kind == MULTIPLE_CHOICE):
        return f"peft runs no prefixes on {family} for {task.kind}"
    if isinstance(spec, Prefix) and drops_types(task, family, options):
        return f"peft drops the token types of {family} for {task.kind}"
    return ""


def _head_obstacle(task: TaskSpec, family: str, options: Mapping[str, Any]) -> str:
    if task.kind == EMBEDDING:
        return ""
    if task.head != "hf" or family not in FAMILIES:
        return f"the task models of {family} have no {task.head} head of this form"
    pooling = head_pooling(family, task.kind, options)
    if not task.per_token and task.pooling != pooling:
        return f"the head of {family} reads {pooling} there, not {task.pooling}"
    return ""


def _method(delta: Delta, anatomy: Anatomy) -> dict[str, Any]:
    spec, root = delta.specs[0], module_root(delta.task, anatomy)
    if isinstance(spec, Lora):
        return _lora(spec, anatomy, root)
    if isinstance(spec, Bitfit):
        return {"peft_type": "BEFT", "target_modules": _targets(list(modules(spec, anatomy)), anatomy, root)}
    if isinstance(spec, Ia3):
        return ia3_config(spec, anatomy, root)
    sizes = {
        "num_virtual_tokens": spec.length,
        "num_layers": anatomy.layers,
        "num_attention_heads": anatomy.heads,
        "num_transformer_submodules": 1,
    }
    if isinstance(spec, Prompt):
        prompt = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": anatomy.embedding_width}
        return prompt | sizes
    width = {"token_dim": anatomy.hidden, "encoder_hidden_size": anatomy.hidden, "prefix_projection": False}
    return {"peft_type": "PREFIX_TUNING"} | width | sizes


def _lora(spec: Lora, anatomy: Anatomy, root: str) -> dict[str, Any]:
    """Modules that several slots share have n times the rank, and the alpha that leaves the scale as it is."""
    shares = {path: len(blocks) for path, blocks in modules(spec, anatomy).items()}
    usual = min(shares.values())
    others = {f"{root}{path}": n for path, n in shares.items() if n != usual}
    return {
        "peft_type": "LORA",
        "r": spec.rank * usual,
        "lora_alpha": _alpha(spec, usual),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "bias": "none",
        "target_modules": _targets(list(shares), anatomy, root),
        "rank_pattern": {name: spec.rank * n for name, n in others.items()},
        "alpha_pattern": {name: _alpha(spec, n) for name, n in others.items()},
    }


def _alpha(spec: Lora, shares: int) -> int | float:
    alpha = spec.alpha * (math.sqrt(shares) if spec.rslora else shares)
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(paths: list[str], anatomy: Anatomy, root: str) -> list[str]:
    """Module names as people write them (``query``) where these mean the same modules, else full names."""
    leaves = list(dict.fromkeys(_leaf(path) for path in paths))
    everywhere = {path for slot in anatomy.slots.values() for path in slot.paths if path and _leaf(path) in leaves}
    return leaves if everywhere == set(paths) and "dense" not in leaves else [root + path for path in paths]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
