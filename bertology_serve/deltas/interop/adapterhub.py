"""Adapters in AdapterHub's layout, as the ``adapters`` library writes and reads them: bottlenecks both ways, LoRA, IA3
and prefixes read.

A directory of four files: ``adapter_config.json`` and ``adapter.safetensors``, ``head_config.json`` and
``model_head.safetensors``. The adapter's name stands inside the tensors' names:
``bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight``. The head is the library's own classification head:
``heads.NAME.1`` (H -> H), tanh, ``heads.NAME.4`` (H -> C), or ``heads.NAME.1`` alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bertology_serve.deltas.catalog import ADAPTER_CONFIG, check_name
from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.interop.microsoft import read_trusted
from bertology_serve.deltas.layout import check_shapes, expected_shapes, shapes_of
from bertology_serve.deltas.safe_io import Limits, conform, read_json
from bertology_serve.deltas.store import publish, write_tensors
from bertology_serve.errors import FormatError, SpecError, Unsupported, nearest
from bertology_serve.families import FAMILIES
from bertology_serve.files import JsonObject, staging, write_json
from bertology_serve.kinds import ia3, lora
from bertology_serve.kinds.adapter import Adapter, layers, places
from bertology_serve.kinds.kinds import Spec, Tensors, from_peft
from bertology_serve.kinds.peft_format import MODEL_ROOT, take
from bertology_serve.kinds.prefix import Prefix, split
from bertology_serve.kinds.slots import DOWN, FFN_NORM, Anatomy
from bertology_serve.tasks.heads import head_form
from bertology_serve.tasks.spec import CLASSIFICATION, REGRESSION, TaskSpec

WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS = "adapter.safetensors", "head_config.json", "model_head.safetensors"
KNOWN = tuple(name for name, family in FAMILIES.items() if family.adapterhub)
VERSION = "adapters.1.3.0"
ACTIVATIONS = {"swish": "silu", "silu": "silu", "relu": "relu", "gelu": "gelu", "tanh": "tanh"}
_RUN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_PARTS = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias",
          "up": "adapter_up.weight", "up_bias": "adapter_up.bias"}  # fmt: skip
# What the library's two configurations have in common, and what another value of would be another function.
_FIXED: JsonObject = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "inv_adapter": None, "is_parallel": False,
    "ln_after": False, "ln_before": False, "original_ln_after": True, "phm_layer": False, "residual_before_ln": True,
    "scaling": 1.0, "use_gating": False,
}  # fmt: skip


def is_adapterhub(directory: Path) -> bool:
    """Whether a directory holds an adapter as the ``adapters`` library saves it."""
    path = directory / ADAPTER_CONFIG
    return path.is_file() and "peft_type" not in read_json(path, Limits(), directory)[0]


def write_adapterhub(delta: Delta, directory: Path, anatomy: Anatomy) -> Path:
    """Writes a delta of one bottleneck adapter, with a head of classification; raises Unsupported for others."""
    spec = _only_adapter(delta, anatomy)
    with staging(directory) as stage:
        write_json(stage / ADAPTER_CONFIG, _about(delta, anatomy) | {"config": _config(spec, anatomy)})
        write_tensors(stage / WEIGHTS, _written(delta, spec, anatomy))
        head = _head_written(delta, anatomy)
        labels = {label: i for i, label in enumerate(delta.task.labels)}
        config = {"head_type": "classification", "num_labels": len(labels), "layers": len(head) // 2,
                  "activation_function": "tanh", "label2id": labels, "use_pooler": False, "bias": True}  # fmt: skip
        write_json(stage / HEAD_CONFIG, _about(delta, anatomy) | {"config": config})
        write_tensors(stage / HEAD_WEIGHTS, head)
        publish(stage, directory)
    return directory


def read_adapterhub(
    directory: Path, anatomy: Anatomy, base: BaseRef, name: str, max_length: int = 128, labels: tuple[str, ...] = ()
) -> Delta:
    """The delta of a directory, for the encoder ``base``: AdapterHub names no weights.

    ``labels`` take the place of those of the head's configuration. Raises FormatError for a malformed directory,
    Unsupported for adapters of another form.
    """
    limits = Limits()
    about, _ = read_json(directory / ADAPTER_CONFIG, limits, directory)
    _check_family(anatomy)
    own, config = str(about.get("name", "")), about.get("config")
    if not own or not isinstance(config, dict):
        raise FormatError(f"{directory / ADAPTER_CONFIG} lacks a name or config; expected what adapters writes")
    tensors = read_trusted(directory / WEIGHTS)
    method = config.get("architecture")
    if method not in _METHODS:
        known = nearest(str(method)[:40], (name for name in _METHODS if name))
        raise Unsupported(f"{directory}: architecture={str(method)[:40]} of AdapterHub is not read here; {known}")
    try:
        spec, stacks = _METHODS[method](config, tensors, own, anatomy)
    except (FormatError, SpecError) as error:
        raise FormatError(f"{directory}: {error}") from None
    except Unsupported as error:
        raise Unsupported(f"{directory}: {error}") from None
    if tensors:
        raise Unsupported(f"{directory / WEIGHTS}: {next(iter(tensors))[:120]!r} is no part of {_CALLED[method]}")
    check_shapes(shapes_of(stacks), expected_shapes((spec,), anatomy), str(directory / WEIGHTS))
    task, head = _head(directory, own, anatomy, max_length, labels)
    origin = {"imported_from": "adapterhub", "name": own, "version": str(about.get("version", ""))}
    return Delta(check_name(name, "delta name"), base, task, (spec,), stacks, head, provenance=origin)


def _bottleneck(config: JsonObject, tensors: Tensors, name: str, anatomy: Anatomy) -> tuple[Spec, Tensors]:
    spec = _spec(config, tensors, name, anatomy)
    return spec, _read(tensors, spec, name, anatomy)


def _lora(config: JsonObject, tensors: Tensors, name: str, anatomy: Anatomy) -> tuple[Spec, Tensors]:
    """LoRA, and IA3, which the library holds as a LoRA that scales: ``y = alpha B ⊙ (W x + b)``."""
    _check_fixed(config, {"use_dora": False, "use_gating": False, "vera_b": None, "vera_d": None})
    mode, alpha = config.get("composition_mode", "add"), conform(config.get("alpha", 8), float, "alpha")
    middle, own = f".loras.{name}.", dict[str, Tensor]()
    for path in [path for path in tensors if middle in path]:
        module, _, leaf = path.partition(middle)
        own[f"{MODEL_ROOT}{module}.{leaf}"] = tensors.pop(path).float()
    if mode == "scale":
        factors = {path.replace(".lora_B", ia3.LEAF): alpha * factor for path, factor in own.items()}
        return from_peft(ia3.IA3, {}, factors, anatomy)
    if mode != "add":
        raise Unsupported(f"composition_mode={str(mode)[:40]} of an AdapterHub adapter is not read here")
    given = {"lora_alpha": alpha, "lora_dropout": config.get("dropout")}
    weights = {f"{path}.weight": tensor for path, tensor in own.items()}
    return from_peft(lora.LORA, given, weights, anatomy)


def _prefix(config: JsonObject, tensors: Tensors, name: str, anatomy: Anatomy) -> tuple[Spec, Tensors]:
    """A prefix of every layer, given or made by a small network, which is run here once."""
    _check_fixed(config, {"use_gating": False, "leave_out": []})
    middle = f"prefix_tunings.{name}.self_prefix."
    own: Tensors = {}
    for path in [path for path in tensors if middle in path]:  # each layer names the same tensors once more
        own[path.partition(middle)[2]] = tensors.pop(path).float()
    length = conform(config.get("prefix_length"), int, "prefix_length")
    if config.get("flat"):
        rows = take(own, "control_trans").reshape(length, -1)
    else:
        word = str(config.get("non_linearity")).lower()
        if word not in _RUN:
            raise Unsupported(f"non_linearity={word[:40]} of an AdapterHub prefix: {nearest(word[:40], _RUN)}")
        first, second = ([take(own, f"control_trans.{i}.{part}") for part in ("weight", "bias")] for i in (0, 2))
        rows = F.linear(_RUN[word](F.linear(take(own, "wte.weight"), *first)), *second)
    parts = split(rows, anatomy)
    return Prefix(len(rows)), {f"prefix.{part}": tensor for part, tensor in parts.items()}


def _prompt(config: JsonObject, tensors: Tensors, name: str, anatomy: Anatomy) -> tuple[Spec, Tensors]:
    raise Unsupported(
        "AdapterHub's soft prompts enter after the embeddings' LayerNorm, those here before it; train it here, or "
        "with peft"
    )


_Method = Callable[[JsonObject, Tensors, str, Anatomy], tuple[Spec, Tensors]]
_METHODS: Mapping[str | None, _Method] = {
    None: _bottleneck, "lora": _lora, "prefix_tuning": _prefix, "prompt_tuning": _prompt
}  # fmt: skip
_CALLED = {None: "a bottleneck adapter", "lora": "LoRA or IA3", "prefix_tuning": "a prefix"}


def _check_fixed(config: JsonObject, fixed: JsonObject) -> None:
    """Raises Unsupported naming a field of another value than the only one that is read."""
    for field, value in fixed.items():
        if config.get(field, value) != value:
            raise Unsupported(f"{field}={str(config[field])[:40]} of an AdapterHub adapter is not read here")


def _only_adapter(delta: Delta, anatomy: Anatomy) -> Adapter:
    _check_family(anatomy)
    if len(delta.specs) != 1 or not isinstance(delta.specs[0], Adapter):
        raise Unsupported(f"AdapterHub's layout holds one bottleneck adapter, not {' + '.join(delta.kinds)}")
    if delta.task.kind != CLASSIFICATION or delta.task.pooling != "cls" or delta.task.head == "none":
        raise Unsupported(
            f"AdapterHub's head reads [CLS] for classification; got {delta.task.kind}, {delta.task.pooling} pooling: "
            "train a classification with --pooling cls"
        )
    spec: Adapter = delta.specs[0]
    return spec


def _check_family(anatomy: Anatomy) -> None:
    if anatomy.family not in KNOWN or anatomy.pre_norm:
        raise Unsupported(f"AdapterHub's names are known for {', '.join(KNOWN)}, not for {anatomy.family}")


def _config(spec: Adapter, anatomy: Anatomy) -> JsonObject:
    """The library's configuration: Houlsby's is its double_seq_bn, Pfeiffer's its seq_bn."""
    return {
        **_FIXED,
        "architecture": None, "init_weights": "bert",
        "leave_out": sorted({*range(anatomy.layers)} - {*layers(spec, anatomy)}),
        "mh_adapter": spec.preset == "houlsby" and spec.after != "ffn",
        "output_adapter": spec.preset == "pfeiffer" or spec.after != "attention",
        "original_ln_before": spec.preset == "pfeiffer",
        "non_linearity": {"silu": "swish"}.get(spec.nonlinearity, spec.nonlinearity),
        "reduction_factor": _factor(anatomy.hidden, spec.width),
    }  # fmt: skip


def _factor(hidden: int, width: int) -> float:
    """What ``hidden // factor`` gives the width of, as the library computes it: 32 // 6.4 is 4 there, not 5."""
    factor = hidden / width
    if factor == int(factor):
        return int(factor)
    return factor if hidden // factor == width else math.nextafter(factor, 0.0)


def _about(delta: Delta, anatomy: Anatomy) -> JsonObject:
    return {"hidden_size": anatomy.hidden, "model_class": f"{anatomy.family.capitalize()}AdapterModel",
            "model_name": delta.base.name, "model_type": anatomy.family, "name": delta.name,
            "version": VERSION}  # fmt: skip


def _spec(config: JsonObject, tensors: Tensors, name: str, anatomy: Anatomy) -> Adapter:
    """The spec that a configuration means. Raises Unsupported naming the field that has no counterpart."""
    _check_fixed(config, _FIXED)
    attention, ffn = bool(config.get("mh_adapter")), bool(config.get("output_adapter"))
    if not attention and not ffn:
        raise Unsupported("the AdapterHub adapter stands after neither attention nor FFN")
    before = bool(config.get("original_ln_before", False))
    if before and attention:
        raise Unsupported("original_ln_before=True of an AdapterHub adapter after attention is not read here")
    word = str(config.get("non_linearity"))
    if word not in ACTIVATIONS:
        raise Unsupported(f"non_linearity={word[:40]} of an AdapterHub adapter: {nearest(word[:40], ACTIVATIONS)}")
    left = sorted(config.get("leave_out") or [])
    lowest = left == list(range(len(left)))
    if not lowest and not set(left) < set(range(anatomy.layers)):
        raise Unsupported(f"leave_out={left} of an AdapterHub adapter; expected some of {anatomy.layers} layers")
    stay = None if lowest else tuple(layer for layer in range(anatomy.layers) if layer not in left)
    down = [tensor for path, tensor in tensors.items() if path.endswith(f"adapters.{name}.adapter_down.0.weight")]
    if not down:
        raise FormatError(f"the file holds no tensors of an adapter called {name!r}")
    after = "both" if attention and ffn else "attention" if attention else "ffn"
    preset, placed = ("pfeiffer", "both") if before else ("houlsby", after)
    usual = Adapter(preset).nonlinearity == ACTIVATIONS[word]
    width = max(map(len, down))  # reduction_factor may name one a layer; narrower ones get rows of zeros
    return Adapter(preset, width, placed, None if usual else ACTIVATIONS[word], len(left) * lowest, stay)


def _paths(spec: Adapter, name: str, anatomy: Anatomy) -> dict[tuple[str, int], str]:
    """What the names of an adapter's tensors begin with, by place and layer."""
    found = {}
    for place in places(spec, anatomy):
        for layer in layers(spec, anatomy):
            linear = str(anatomy.slot(DOWN if place == FFN_NORM else place).paths[layer])
            found[place, layer] = f"{anatomy.prefix}.{linear.rpartition('.')[0]}.adapters.{name}."
    return found


def _written(delta: Delta, spec: Adapter, anatomy: Anatomy) -> Tensors:
    """Ours are [M, H] both ways; the library's up is a linear's [H, M]."""
    written: Tensors = {}
    found = layers(spec, anatomy)
    for (place, layer), start in _paths(spec, delta.name, anatomy).items():
        for part, path in _PARTS.items():
            tensor = delta.tensors[f"adapter.{place}.{part}"][found.index(layer)]
            written[start + path] = tensor.T if part == "up" else tensor
    return written


def _read(tensors: Tensors, spec: Adapter, name: str, anatomy: Anatomy) -> Tensors:
    stacks: dict[str, list[Tensor]] = {}
    for (place, _), start in _paths(spec, name, anatomy).items():
        for part, path in _PARTS.items():
            tensor = take(tensors, start + path).float()
            tensor = tensor.T if part == "up" else tensor
            if part != "up_bias":
                tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, max(0, spec.width - len(tensor))))
            stacks.setdefault(f"adapter.{place}.{part}", []).append(tensor)
    return {name: torch.stack(parts).contiguous() for name, parts in stacks.items()}


def _head_written(delta: Delta, anatomy: Anatomy) -> Tensors:
    """``heads.NAME.1`` and, of a head of two layers, ``heads.NAME.4``."""
    form = head_form(anatomy.family, anatomy.prefix, delta.task, anatomy.hidden, {})
    if len(form) == 2 and form[0].activation != "tanh":
        raise Unsupported(f"the head of {anatomy.family} has {form[0].activation}, AdapterHub's has tanh")
    lacking = [f"{dense.path}.weight" for dense in form if f"{dense.path}.weight" not in delta.head]
    if lacking:
        raise Unsupported(f"the head takes {lacking[0]} from the base; AdapterHub's brings its own: take --head linear")
    return {
        f"heads.{delta.name}.{number}.{part}": delta.head[f"{dense.path}.{part}"]
        for number, dense in zip((1, 4), form, strict=False)
        for part in ("weight", "bias")
    }


def _head(
    directory: Path, name: str, anatomy: Anatomy, max_length: int, labels: tuple[str, ...]
) -> tuple[TaskSpec, Tensors]:
    """The task and the head by HuggingFace's names."""
    limits = Limits()
    about, _ = read_json(directory / HEAD_CONFIG, limits, directory)
    config = about.get("config")
    if not isinstance(config, dict) or config.get("head_type") != "classification" or config.get("use_pooler"):
        raise Unsupported(f"{directory / HEAD_CONFIG} is no plain classification head; others are not read here")
    own = f"heads.{name}."  # the library also saves heads whose names only begin like this one's
    tensors = {path: tensor for path, tensor in read_trusted(directory / HEAD_WEIGHTS).items() if path.startswith(own)}
    numbers = sorted({int(found[1]) for path in tensors if (found := re.search(r"\.(\d+)\.weight$", path))})
    known = {int(i): label for label, i in (config.get("label2id") or {}).items()}
    form = "hf" if len(numbers) == 2 else "linear"
    if config.get("num_labels", len(known)) == 1:  # as the library trains it: by the squared error
        task = TaskSpec(REGRESSION, max_length=max_length, head=form)
    else:
        named = labels or tuple(known[i] for i in sorted(known))
        task = TaskSpec(CLASSIFICATION, named, max_length=max_length, head=form)
    layers = head_form(anatomy.family, anatomy.prefix, task, anatomy.hidden, {})
    two = config.get("activation_function") == "tanh" and layers[0].activation == "tanh"
    if len(layers) != len(numbers) or (len(layers) == 2 and not two):
        raise Unsupported(f"{directory}: a head of {len(numbers)} layers is not the one of {anatomy.family}")
    head = {
        f"{dense.path}.{part}": take(tensors, f"heads.{name}.{number}.{part}").float()
        for number, dense in zip(numbers, layers, strict=True)
        for part in ("weight", "bias")
    }
    if tensors:
        raise SpecError(f"{directory / HEAD_WEIGHTS}: {next(iter(tensors))[:120]!r} is no part of that head")
    return task, head
