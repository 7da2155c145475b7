"""How a delta's tensors are named and shaped on disk (as peft does, where peft has the kind), checks of that, and
the ``adapter_config.json`` of those deltas of which peft computes the same function.

* what peft computes too: peft's names and shapes, as each kind's file says (``kinds/lora.py``: ``write``, ``read``).
* everything else: ``bertology.{kind}.{name}``, shaped as in memory.
* heads: ``base_model.model.{HuggingFace name}``; beside ``prompt_embeddings`` alone ``base_model.{HuggingFace name}``.

``root`` is ``base_model.model.{prefix}.``; embedding models have no prefix. Reading gives back what was written, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas.catalog import OWN_PREFIX
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.pruning import PRUNED
from bertology_serve.errors import BaseMismatch, FormatError, SpecError, nearest
from bertology_serve.families import FAMILIES, family_named
from bertology_serve.files import JsonObject
from bertology_serve.kinds import kinds
from bertology_serve.kinds.kinds import Spec, Tensors, kind_of
from bertology_serve.kinds.peft_format import MODEL_ROOT, PROMPT_ROOT, PeftFormat
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.heads import Dense, head_form, head_pooling
from bertology_serve.tasks.spec import TaskSpec


def peft_format(spec: Spec, specs: Sequence[Spec], anatomy: Anatomy) -> PeftFormat[Any] | None:
    """How peft stores one component of a delta; ``None`` where it computes no such thing, or not in this way."""
    stored = kind_of(spec).peft
    if isinstance(stored, str) or stored.obstacle(spec, anatomy):
        return None
    return None if stored.virtual and len([other for other in specs if _is_virtual(other)]) > 1 else stored


def _is_virtual(spec: Spec) -> bool:
    stored = kind_of(spec).peft
    return not isinstance(stored, str) and stored.virtual


def head_root(specs: Sequence[Spec], anatomy: Anatomy) -> str:
    """What the names of head tensors begin with."""
    stored = peft_format(specs[0], specs, anatomy) if len(specs) == 1 else None
    return PROMPT_ROOT if stored is not None and stored.virtual else MODEL_ROOT


def to_disk(tensors: Mapping[str, Tensor], specs: Sequence[Spec], anatomy: Anatomy, root: str) -> Tensors:
    """The components' tensors under their names on disk."""
    written: Tensors = {}
    for spec in specs:
        kind, stored = kind_of(spec).name, peft_format(spec, specs, anatomy)
        own = {n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(f"{kind}.")}
        if stored is not None:
            written |= stored.write(spec, own, anatomy, root)
        else:
            written |= {f"{OWN_PREFIX}{kind}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.contiguous() for name, tensor in written.items()}


def from_disk(written: Tensors, specs: Sequence[Spec], anatomy: Anatomy, root: str) -> Tensors:
    """The inverse of ``to_disk``; takes what it reads out of ``written``. Raises FormatError for what is missing."""
    tensors: Tensors = {}
    for spec in specs:
        kind, stored = kind_of(spec).name, peft_format(spec, specs, anatomy)
        start = f"{OWN_PREFIX}{kind}."
        if stored is not None:
            own = stored.read(spec, written, anatomy, root)
        else:
            own = {name.removeprefix(start): written.pop(name) for name in list(written) if name.startswith(start)}
        tensors |= {f"{kind}.{name}": tensor for name, tensor in own.items()}
    return tensors


Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected_shapes(specs: Sequence[Spec], anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    """The components' shapes by name, nothing allocated; FormatError where the encoder cannot have such components."""
    try:
        return shapes_of(kinds.init(specs, anatomy, None))
    except (SpecError, RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise FormatError(f"the kinds do not fit the encoder: {str(error).splitlines()[0][:200]}") from None


def check_shapes(found: Shapes, expected: Shapes, what: str) -> None:
    """Raises FormatError for a tensor that is missing, unknown or of another shape."""
    for name in found.keys() - expected.keys():
        hint = nearest(name[:120], expected) if expected else "expected none"
        raise FormatError(f"{what}: unknown tensor {name[:120]!r}; {hint}")
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{what}: the tensor {name!r} is missing; expected {list(shape)}")
        if found[name] != shape:
            raise FormatError(f"{what}: the tensor {name!r} has shape {list(found[name])}; expected {list(shape)}")


def check_head(head: Shapes, task: TaskSpec, anatomy: Anatomy, options: JsonObject) -> None:
    """Raises FormatError for a head's tensor that is unknown, misshapen or missing.

    ``head`` are shapes by HuggingFace name, ``options`` values of the encoder's configuration. Parts that the base
    checkpoint may bring (BERT's pooler) are not missed here: the encoder that the delta is attached to knows.
    """
    form = head_form(anatomy.family, anatomy.prefix, task, anatomy.hidden, options)
    known = {name: shape for dense in form for name, shape in _head_tensors(dense).items()}
    needed = {f"{dense.path}.weight" for dense in form if dense.base_name is None}
    lacking = [name for name in known if name in needed and name not in head]
    if lacking:
        raise FormatError(f"the head lacks {', '.join(lacking)}; a head must be saved with all that the base lacks")
    wanted = {name: shape for name, shape in known.items() if name in head}
    check_shapes(head, wanted, f"the head of {anatomy.family} for {task.kind}")


def check_fits(delta: Delta, made_for: Anatomy, anatomy: Anatomy) -> None:
    """Raises BaseMismatch unless an encoder has the dimensions of the one that the delta was made for."""
    for field in ("family", "layers", "hidden", "heads", "embedding_width"):
        ours, theirs = getattr(anatomy, field), getattr(made_for, field)
        if ours != theirs:
            raise BaseMismatch(
                f"delta {delta.name!r} was made for {delta.base.name} with {field} {theirs}; this encoder has {ours}"
            )
    try:
        fits = expected_shapes(delta.specs, anatomy) == shapes_of(delta.tensors)
    except FormatError:
        fits = False
    if not fits:
        raise BaseMismatch(f"delta {delta.name!r} was made for {delta.base.name}, whose projections have other shapes")


def check_base(delta: Delta, ref: BaseRef) -> None:
    """Raises BaseMismatch, naming both, unless the delta was made for exactly these weights."""
    if delta.base.sha256 != ref.sha256:
        raise BaseMismatch(
            f"delta {delta.name!r} was made for {delta.base.name} (weights {delta.base.sha256[:12] or 'unknown'}), "
            f"but the encoder is {ref.name} (weights {ref.sha256[:12]}); "
            f"give the encoder that it was made for, or train it again on this one"
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises FormatError for NaN and infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(f"the tensor {name[:120]!r} holds NaN or infinity; train the delta again")


def _head_tensors(dense: Dense) -> dict[str, tuple[int, ...]]:
    """Names and shapes that one layer of a head may have."""
    weight = {} if dense.tied else {f"{dense.path}.weight": (dense.outputs, dense.inputs)}
    found: dict[str, tuple[int, ...]] = {**weight, f"{dense.path}.bias": (dense.outputs,)}
    if dense.norm:
        found |= {f"{dense.norm}.weight": (dense.outputs,), f"{dense.norm}.bias": (dense.outputs,)}
    return found


# Multiple choice has no task type in peft: its plain PeftModel runs the task model, the head listed by name.
TASK_TYPES: dict[str, str | None] = {
    tasks.CLASSIFICATION: "SEQ_CLS",
    tasks.MULTI_LABEL: "SEQ_CLS",
    tasks.REGRESSION: "SEQ_CLS",
    tasks.TOKEN_CLASSIFICATION: "TOKEN_CLS",
    tasks.QUESTION_ANSWERING: "QUESTION_ANS",
    tasks.EMBEDDING: "FEATURE_EXTRACTION",
    tasks.ZERO_SHOT: "FEATURE_EXTRACTION",
    tasks.MULTIPLE_CHOICE: None,
    tasks.SPARSE: None,
    tasks.MULTI_VECTOR: None,
}


def module_root(task: TaskSpec, anatomy: Anatomy) -> str:
    """What encoder modules' names begin with in the task's HuggingFace model; empty for the bare encoder."""
    return "" if task.kind in tasks.POOLED_KINDS or not anatomy.prefix else f"{anatomy.prefix}."


def tensor_root(task: TaskSpec, anatomy: Anatomy) -> str:
    """What the names of encoder tensors begin with on disk."""
    return MODEL_ROOT + module_root(task, anatomy)


def drops_types(task: TaskSpec, family: str, options: JsonObject) -> bool:
    """Whether peft's model for a task silently drops the token types that the family's pairs carry.

    ``PeftModelForQuestionAnswering.forward`` (0.21.2) takes ``token_type_ids`` and passes them to nobody.
    """
    own = family_named(family).token_types
    types = int(options.get("type_vocab_size") or (0 if options else own or 0))
    return task.kind == tasks.QUESTION_ANSWERING and task.token_types and types > 1 and own != 0


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


def pools_the_prompt(task: TaskSpec) -> bool:
    """Whether peft's row for a text, or what its rows are pooled to, is made of a prompt's rows too."""
    return not task.per_token and (TASK_TYPES[task.kind] != "SEQ_CLS" or task.pooling != "cls")


def _method_obstacle(delta: Delta, anatomy: Anatomy, options: JsonObject) -> str:
    spec, kind, task, family = delta.specs[0], delta.kinds[0], delta.task, anatomy.family
    stored = kind_of(spec).peft
    if isinstance(stored, str):
        return stored or f"peft computes no {kind} in this way"
    reason = stored.obstacle(spec, anatomy)
    if reason or not stored.virtual:
        return reason
    if kind == "prompt" and (task.per_token or pools_the_prompt(task)):
        return f"peft answers {task.kind} with the prompt's rows among the text's"
    if kind == "prefix" and (not family_named(family).peft_prefix or task.kind == tasks.MULTIPLE_CHOICE):
        return f"peft runs no prefixes on {family} for {task.kind}"
    if kind == "prefix" and drops_types(task, family, options):
        return f"peft drops the token types of {family} for {task.kind}"
    return ""


def _head_obstacle(task: TaskSpec, family: str, options: JsonObject) -> str:
    if task.kind in tasks.POOLED_KINDS:
        return ""
    if task.kind in (tasks.SPARSE, tasks.MULTI_VECTOR):
        return f"peft has no model for {task.kind}"
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
