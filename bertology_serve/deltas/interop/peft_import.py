"""Deltas from directories that peft wrote: LoRA, DoRA, IA3, BEFT (biases), prompt tuning and prefix tuning.

A setting of ``adapter_config.json`` that is not known to leave the function alone is refused by name, so that no
checkpoint is answered differently without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, float32

from bertology_serve.deltas.catalog import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from bertology_serve.deltas.delta import BaseRef, Delta, EncoderShape
from bertology_serve.deltas.interop.sentence_transformers import embedding_task, reader
from bertology_serve.deltas.layout import TASK_TYPES, check_head, drops_types, pools_the_prompt, shapes_of
from bertology_serve.deltas.safe_io import Limits, read_json, read_tensors
from bertology_serve.errors import FormatError, SpecError, Unsupported, nearest
from bertology_serve.files import JsonObject
from bertology_serve.kinds import kinds
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.kinds import KINDS, Kind, Spec, Tensors, chosen_layers, from_peft
from bertology_serve.kinds.lora import Lora, check_none_left, pair_of
from bertology_serve.kinds.peft_format import MERGE, MODEL_ROOT, PROMPT_ROOT, PeftFormat, places
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks import spec as tasks
from bertology_serve.tasks.heads import Dense, head_form, head_pooling
from bertology_serve.tasks.spec import TaskSpec

# Settings that leave the function alone, or are read here, whatever their value.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
    "num_attention_heads", "num_layers", "num_virtual_tokens", "peft_type", "peft_version", "prompt_tuning_init",
    "prompt_tuning_init_text", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "feedforward_modules", "init_ia3_weights",
    "target_modules", "task_type", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path", "use_rslora",
}  # fmt: skip
# Methods of which peft 0.21 makes a LoRA by ``convert_to_lora``, and those that it cannot fold into the weights.
_CONVERTED = {
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA",
    "VBLORA", "WAVEFT",
}  # fmt: skip
_UNMERGED = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY", "XLORA"}
# Settings that are read at these values only. The other ways of initialising LoRA change the base weights.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "num_transformer_submodules": (None, 1),
}
_WRAPPED = re.compile(r"\.(modules_to_save|base_layer|ln_tuning_layers)(\.default)?(?=\.)")
_POOLER_LORA = re.compile(r"(.*\.)?pooler\.dense\.lora_[AB]\.weight")
_LONGEST = 512
_CONVERT = "convert it with bertology-serve convert"
_AGAIN = "peft cannot merge it either: train it again without"
_HEADLESS = f"train it again with its head in modules_to_save, or {MERGE}"
NORMS_ALONE = "LN_TUNING"  # nothing but norms, which whoever has the base's weights takes out beforehand
METHODS: dict[str, tuple[Kind[Any], PeftFormat[Any]]] = {
    kind.peft.method: (kind, kind.peft) for kind in KINDS.values() if not isinstance(kind.peft, str)
}


def import_peft(
    directory: Path,
    anatomy: Anatomy,
    base: BaseRef,
    known_as: Path,
    *,
    task: TaskSpec | str | None = None,
    options: JsonObject | None = None,
    limits: Limits | None = None,
    root: Path | None = None,
    base_head: Mapping[str, Tensor] | None = None,
    read: tuple[JsonObject, Tensors] | None = None,
) -> Delta:
    """The delta ``known_as`` (NAME/VERSION) of a peft directory, for the encoder ``base``: peft names no weights.

    ``task`` says what peft does not: labels, maximum length. Without it, or with its kind alone, they follow from the
    task type and the head's width (``LABEL_0``...), for embeddings from what sentence-transformers wrote beside.
    ``base_head`` is what the base checkpoint has of a head, by its name there: a delta whose LoRA reaches the pooler
    carries the pooler's whole weight. ``read`` are the configuration and the tensors where they were read already.
    Raises FormatError for a malformed directory, Unsupported for what cannot be had here.
    """
    limits, root = limits or Limits(), root or directory
    config, tensors = read or (
        read_json(directory / ADAPTER_CONFIG, limits, root)[0],
        read_tensors(directory / ADAPTER_WEIGHTS, limits, root)[0],
    )
    method = str(config.get("peft_type"))
    if method not in METHODS and method != NORMS_ALONE:
        known = (*METHODS, NORMS_ALONE)
        raise Unsupported(f"{directory} holds peft's {method[:40]}; {_way_out(method)}{nearest(method[:40], known)}")
    kind, stored = METHODS.get(method, (None, None))
    _check_settings(config, directory, stored)
    left = {name: tensor.to(float32) for name, tensor in tensors.items()}
    try:
        _check_no_wholes(left, anatomy)
        if stored is not None and stored.leaf:
            check_whole(config, left, stored.leaf, anatomy)
        spec, components = (None, {}) if kind is None else from_peft(kind, config, left, anatomy)
        head = _head(left, PROMPT_ROOT if stored is not None and stored.virtual else MODEL_ROOT, anatomy)
        if not isinstance(task, TaskSpec):
            virtual = spec.length if isinstance(spec, Prompt | Prefix) else 0
            longest = max(3, min(_LONGEST, anatomy.max_tokens - virtual))
            inside = bool(anatomy.prefix) and any(n.startswith(f"{MODEL_ROOT}{anatomy.prefix}.") for n in tensors)
            task = _task(config, head, anatomy.family, task, longest, options or {}, inside) or embedding_task(
                reader(directory, limits, root), directory, longest
            )
        if isinstance(spec, Prompt) and pools_the_prompt(task):
            raise Unsupported(
                f"peft pools the prompt's rows with the text's for {task.kind}, and here the text's alone are pooled; "
                "train it again with another method, such as LoRA"
            )
        pooled = isinstance(spec, Prefix) and task.kind in tasks.POOLED_KINDS  # peft drops their types too
        if config.get("task_type") and (pooled or drops_types(task, anatomy.family, options or {})):
            task = replace(task, token_types=False)
        if method == "LORA":
            head = _merged(config, head, task, anatomy, options or {}, base_head or {})
        check_head(shapes_of(head), task, anatomy, options or {})
    except (FormatError, SpecError) as error:
        raise FormatError(f"{directory}: {error}") from None
    except Unsupported as error:
        raise Unsupported(f"{directory}: {error}") from None
    return Delta(
        known_as.parent.name, base, task, () if spec is None else (spec,), components, head, version=known_as.name,
        provenance=_provenance(config), made_for=EncoderShape(anatomy, dict(options or {})),
    )  # fmt: skip


def _check_settings(config: JsonObject, directory: Path, stored: PeftFormat[Any] | None) -> None:
    own = stored.settings if stored else frozenset()
    for name, value in config.items():
        if name in _NEUTRAL:
            fine = any(value is known or (type(value) is type(known) and value == known) for known in _NEUTRAL[name])
        else:
            fine = name in _HARMLESS or name in own or not value
        if not fine:
            read = name == "use_dora" or (name == "bias" and value in ("all", "lora_only"))
            merge = _AGAIN if stored is not None and stored.virtual else MERGE
            way = _CONVERT if read else merge
            raise Unsupported(f"{directory}: {name[:60]}={str(value)[:60]} is not read here; {way}")


def _merged(
    config: JsonObject, head: Tensors, task: TaskSpec, anatomy: Anatomy, options: JsonObject,
    base_head: Mapping[str, Tensor],
) -> Tensors:  # fmt: skip
    """The head with the LoRA of its layers merged; embeddings do not read the pooler, whatever its LoRA."""
    if task.kind == tasks.EMBEDDING:
        head = {name: tensor for name, tensor in head.items() if not _POOLER_LORA.fullmatch(name)}
    merge_head(config, head, head_form(anatomy.family, anatomy.prefix, task, anatomy.hidden, options), base_head)
    check_none_left(head, anatomy)
    return head


def _way_out(method: str) -> str:
    """What can be done about a method that is not read here."""
    if method in _CONVERTED:
        return "peft's convert_to_lora makes a LoRA of it; "
    return "" if method in _UNMERGED else f"{MERGE}; "


_TARGETS = re.compile(
    r"(?:[\w.*+\\$^|-]|\[[\w-]+\]|\((?:\?:)?[\w|.\\-]+\))+"
)  # no repeated groups, for the same reason


def merge_head(config: JsonObject, head: Tensors, form: Sequence[Dense], base_head: Mapping[str, Tensor]) -> None:
    """Merges the LoRA of a head's own layers (the pooler, which ``all-linear`` reaches) into weights of the delta.

    ``base_head`` is what the base checkpoint has of a head. Raises FormatError where nobody has the weight, or where
    the file lacks the tensors of a layer that ``target_modules`` name.
    """
    for dense in form:
        name, weight = f"{dense.path}.lora_A.weight", f"{dense.path}.weight"
        if name not in head:
            if weight not in head and _is_targeted(config, dense.path, None):
                raise FormatError(_lacking(dense.path, 1))
            continue
        pair = pair_of(dense.path, name, head, config, dense.inputs, dense.outputs)
        for leaf in ("weight", "bias"):
            if f"{dense.path}.{leaf}" not in head and f"{dense.base_name}.{leaf}" in base_head:
                head[f"{dense.path}.{leaf}"] = base_head[f"{dense.base_name}.{leaf}"]
        if weight not in head:
            raise FormatError(
                f"{dense.path} has LoRA, but neither the adapter nor the base has its weight; train it again with "
                f"{dense.path!r} among modules_to_save or exclude_modules"
            )
        head[weight] = head[weight] + pair.scale * (pair.b @ pair.a)


def check_whole(config: JsonObject, tensors: Mapping[str, Tensor], leaf: str, anatomy: Anatomy) -> None:
    """Raises FormatError where the file lacks a tensor ``leaf`` of a projection that ``target_modules`` name."""
    found = {name.removeprefix(MODEL_ROOT).removesuffix(leaf) for name in tensors if name.endswith(leaf)}
    start = f"{anatomy.prefix}." if any(name.startswith(f"{anatomy.prefix}.") for name in found) else ""
    named = (start + path for path, (_, layer) in places(anatomy).items() if _is_targeted(config, start + path, layer))
    missing = [name for name in named if name not in found]
    if found and missing:
        raise FormatError(_lacking(missing[0], len(missing)))


def _lacking(module: str, count: int) -> str:
    others = f" and of {count - 1} other modules" if count > 1 else ""
    return f"the file lacks the tensors of {module}{others}, which target_modules name; copy it again"


def _is_targeted(config: JsonObject, module: str, layer: int | None) -> bool:
    """Whether peft changes the module of that full name; False where that cannot be told."""
    layers = config.get("layers_to_transform")
    if layers is not None and layer not in (layers if isinstance(layers, list) else [layers]):
        return False
    return _named(config.get("target_modules"), module, False) and not _named(
        config.get("exclude_modules"), module, True
    )


def _named(targets: Any, module: str, doubt: bool) -> bool:
    """Whether a list of names or a pattern means a module, as peft reads them; ``doubt`` for patterns not read here."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        most = max(part.count("*") + part.count("+") for part in targets.split("|"))
        if len(targets) > 500 or most > 3 or not _TARGETS.fullmatch(targets):
            return doubt
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return doubt
    return isinstance(targets, list) and any(module == name or module.endswith(f".{name}") for name in targets)


def _head(tensors: Tensors, root: str, anatomy: Anatomy) -> Tensors:
    """What is left when the method has taken its tensors, by HuggingFace names."""
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(root):
            raise Unsupported(f"the tensor {name[:120]!r} belongs to no method that is read here; expected {root}...")
        if ".original_module." not in name:
            head[unwrapped(name.removeprefix(root))] = tensor
    return head


def _check_no_wholes(tensors: Tensors, anatomy: Anatomy) -> None:
    """Raises Unsupported for weights of the encoder that stand whole in the file, as ``modules_to_save`` leaves them.

    Converting makes differences of biases and norms; a matrix is in no delta beside an adapter.
    """
    changed = {path for slot in anatomy.slots.values() for path in slot.paths}
    wholes: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = unwrapped(name.removeprefix(MODEL_ROOT).removeprefix(PROMPT_ROOT))
        module, _, part = own.removeprefix(f"{anatomy.prefix}.").rpartition(".")
        if part in ("weight", "bias") and (module in changed or module.startswith("embeddings.")):
            wholes[own] = tensor
    if wholes:
        own = max(wholes, key=lambda name: wholes[name].dim())
        way = _CONVERT if wholes[own].dim() == 1 else MERGE
        raise Unsupported(f"it holds {own[:120]!r} of the encoder whole; {way}")


def unwrapped(name: str) -> str:
    """A tensor's name in HuggingFace's model, without the modules that peft put around it."""
    return _WRAPPED.sub("", name, count=1)


def _task(
    config: JsonObject, head: Tensors, family: str, told: str | None, longest: int, options: JsonObject,
    inside: bool,
) -> TaskSpec | None:  # fmt: skip
    """The task as far as peft records it; None for embeddings. ``inside``: the encoder is a part of a task model."""
    kind = told or {t: k for k, t in reversed(TASK_TYPES.items()) if t}.get(str(config.get("task_type")))
    if kind is None and not config.get("task_type"):  # what peft's plain model answers shows in its names alone
        whole = [name for name in head if ".lora_" not in name]
        if inside and not whole:
            raise FormatError(f"it adapts a task model, whose head it does not hold; {_HEADLESS}")
        kind = tasks.EMBEDDING if not whole else tasks.QUESTION_ANSWERING if "qa_outputs.weight" in head else None
    if kind is None:
        got = str(config.get("task_type"))[:40]
        raise FormatError(f"task_type is {got!r}, which names no task of these; convert it with --task")
    if kind == tasks.EMBEDDING:
        return None
    if kind == tasks.QUESTION_ANSWERING:
        return TaskSpec(kind, max_length=longest, stride=min(128, longest // 4))
    outputs = next((len(head[n]) for n in ("classifier.out_proj.weight", "classifier.weight") if n in head), 0)
    if not outputs:
        raise FormatError(f"the checkpoint holds no classifier; {_HEADLESS}")
    kind = tasks.REGRESSION if kind == tasks.CLASSIFICATION and outputs == 1 else kind
    labels = (
        tuple(f"LABEL_{i}" for i in range(outputs)) if kind in (*tasks.LABEL_KINDS, tasks.TOKEN_CLASSIFICATION) else ()
    )
    return TaskSpec(kind, labels, max_length=longest, pooling=head_pooling(family, kind, options))


def _provenance(config: JsonObject) -> JsonObject:
    recorded = ("peft_type", "peft_version", "base_model_name_or_path", "revision")
    return {"imported_from": "peft", **{name: str(config[name]) for name in recorded if config.get(name)}}


LEAF = ".lora_magnitude_vector"
Magnitudes = Mapping[str, Tensor]


def spelt_out(lora: Delta, magnitudes: Magnitudes, weights: Mapping[str, Tensor], anatomy: Anatomy) -> Delta:
    """The LoRA delta of a DoRA checkpoint with its magnitudes [N] by module path, as three kinds.

    ``weights`` is the base's state dict. Raises FormatError where a magnitude is missing or belongs to no update.
    """
    (spec,) = lora.specs
    assert isinstance(spec, Lora)
    left, tensors = dict(magnitudes), dict(lora.tensors)
    factors, shifts = Ia3(spec.targets, (), spec.layers), Bitfit(layers=spec.layers)
    generator = torch.Generator()
    gains, biases = kinds.init([factors], anatomy, generator), kinds.init([shifts], anatomy, generator)
    for name in spec.targets:
        slot = anatomy.slot(name)
        tensors[f"lora.{name}.b"] = tensors[f"lora.{name}.b"].clone()
        for index, layer in enumerate(chosen_layers(spec.layers, slot.depth)):
            path, a = str(slot.paths[layer]), tensors[f"lora.{name}.a"][index]
            b = tensors[f"lora.{name}.b"][index]
            if path not in left and not a.any():
                continue  # a slot that is changed in other layers only
            gain = _gain(path, left.pop(path, None), weights[f"{path}.weight"], spec.scale * b.double().T @ a.double())
            gains[f"ia3.{name}"][index] = gain.float()
            tensors[f"lora.{name}.b"][index] = (b.double() * gain).float()
            bias = weights.get(f"{path}.bias")
            if bias is not None:
                biases[f"bitfit.{name}"][index] = ((1.0 - gain) * bias.cpu().double()).float()
    head = _scaled_head(lora, left, anatomy)
    shifted = any(stack.any() for stack in biases.values())
    specs: list[Spec] = [spec, factors, *([shifts] if shifted else [])]
    return replace(lora, specs=tuple(specs), tensors={**tensors, **gains, **(biases if shifted else {})}, head=head)


def _scaled_head(lora: Delta, left: Magnitudes, anatomy: Anatomy) -> Tensors:
    """The head, whose layers' LoRA is merged already, with the rows that have magnitudes brought to these."""
    head = dict(lora.head)
    for path, magnitude in left.items():
        name = next((n for n in (f"{anatomy.prefix}.{path}.weight", f"{path}.weight") if n in head), None)
        if name is not None:
            head[name] = (head[name].double() * _gain(path, magnitude, head[name], torch.zeros(()))[:, None]).float()
        elif lora.task.kind not in tasks.POOLED_KINDS or path != "pooler.dense":  # embeddings do not read the pooler
            raise FormatError(f"the magnitudes of {path[:80]} belong to no update; save the checkpoint again")
    return head


def magnitudes(tensors: Tensors, anatomy: Anatomy, root: str) -> dict[str, Tensor]:
    """Takes peft's magnitude vectors out of ``tensors``, by module path in the headless encoder."""
    found = {}
    for name in [name for name in tensors if name.removesuffix(".weight").endswith(LEAF)]:
        path = name.removesuffix(".weight").removeprefix(root).removesuffix(LEAF)
        found[path.removeprefix(f"{anatomy.prefix}.")] = tensors.pop(name).float()
    return found


def _gain(path: str, magnitude: Tensor | None, weight: Tensor, change: Tensor) -> Tensor:
    """``m / ‖W + s B A‖`` [N], float64, for one module."""
    if magnitude is None or magnitude.numel() != len(weight):
        raise FormatError(f"the magnitudes of {path} are missing or of another width; save the checkpoint again")
    whole: Tensor = weight.cpu().double() + change
    gain: Tensor = magnitude.flatten().double() / torch.linalg.vector_norm(whole, dim=1)
    return gain
