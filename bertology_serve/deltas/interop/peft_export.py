"""The ``adapter_config.json`` of a delta, for those deltas of which peft computes the same function."""

from __future__ import annotations

from collections.abc import Iterable

from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.pruning import PRUNED
from bertology_serve.families import FAMILIES, family_named
from bertology_serve.files import JsonObject
from bertology_serve.kinds.kinds import kind_of
from bertology_serve.kinds.peft_format import MODEL_ROOT
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import head_pooling
from bertology_serve.tasks.spec import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    REGRESSION,
    TOKEN_CLASSIFICATION,
    TaskSpec,
)

# Multiple choice has no task type in peft: its plain PeftModel runs the task model, the head listed by name.
TASK_TYPES: dict[str, str | None] = {
    CLASSIFICATION: "SEQ_CLS",
    MULTI_LABEL: "SEQ_CLS",
    REGRESSION: "SEQ_CLS",
    TOKEN_CLASSIFICATION: "TOKEN_CLS",
    QUESTION_ANSWERING: "QUESTION_ANS",
    EMBEDDING: "FEATURE_EXTRACTION",
    MULTIPLE_CHOICE: None,
}


def module_root(task: TaskSpec, anatomy: Anatomy) -> str:
    """What encoder modules' names begin with in the task's HuggingFace model; empty for the bare encoder."""
    return "" if task.kind == EMBEDDING or not anatomy.prefix else f"{anatomy.prefix}."


def tensor_root(task: TaskSpec, anatomy: Anatomy) -> str:
    """What the names of encoder tensors begin with on disk."""
    return MODEL_ROOT + module_root(task, anatomy)


def drops_types(task: TaskSpec, family: str, options: JsonObject) -> bool:
    """Whether peft's model for a task silently drops the token types that the family's pairs carry.

    ``PeftModelForQuestionAnswering.forward`` (0.21.2) takes ``token_type_ids`` and passes them to nobody.
    """
    own = family_named(family).token_types
    types = int(options.get("type_vocab_size") or (0 if options else own or 0))
    return task.kind == QUESTION_ANSWERING and task.token_types and types > 1 and own != 0


def obstacle(delta: Delta, anatomy: Anatomy, options: JsonObject) -> str:
    """Why peft does not compute the same function; empty where it does. ``options`` are the encoder's configuration."""
    if options.get(PRUNED):
        return "peft cannot load the encoder, which was pruned"
    if delta.weights or len(delta.specs) != 1:
        return f"peft has no single method for {', '.join(delta.kinds)}"
    return _method_obstacle(delta, anatomy, options) or _head_obstacle(delta.task, anatomy.family, options)


def adapter_config(delta: Delta, anatomy: Anatomy, options: JsonObject) -> JsonObject:
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


def _method_obstacle(delta: Delta, anatomy: Anatomy, options: JsonObject) -> str:
    spec, task, family = delta.specs[0], delta.task, anatomy.family
    stored = kind_of(spec).peft
    if isinstance(stored, str):
        return stored or f"peft computes no {delta.kinds[0]} in this way"
    reason = stored.obstacle(spec, anatomy)
    if reason or not stored.virtual:
        return reason
    if isinstance(spec, Prompt) and TASK_TYPES[task.kind] != "SEQ_CLS":
        return f"peft answers {task.kind} with the prompt's rows among the text's"
    if isinstance(spec, Prefix) and (not family_named(family).peft_prefix or task.kind == MULTIPLE_CHOICE):
        return f"peft runs no prefixes on {family} for {task.kind}"
    if isinstance(spec, Prefix) and drops_types(task, family, options):
        return f"peft drops the token types of {family} for {task.kind}"
    return ""


def _head_obstacle(task: TaskSpec, family: str, options: JsonObject) -> str:
    if task.kind == EMBEDDING:
        return ""
    if task.head != "hf" or family not in FAMILIES:
        return f"the task models of {family} have no {task.head} head of this form"
    pooling = head_pooling(family, task.kind, options)
    if not task.per_token and task.pooling != pooling:
        return f"the head of {family} reads {pooling} there, not {task.pooling}"
    return ""


def _method(delta: Delta, anatomy: Anatomy) -> JsonObject:
    spec = delta.specs[0]
    stored = kind_of(spec).peft
    assert not isinstance(stored, str)
    return {"peft_type": stored.method, **stored.config(spec, anatomy, module_root(delta.task, anatomy))}
