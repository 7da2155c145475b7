"""Finds an encoder's anatomy: which modules are its query, key, value, output, FFN, norms and embeddings.

Nothing is looked up by checkpoint. The layer stack is the longest ``ModuleList`` of one class; inside a layer the
projections are told apart by the role names that BERT-like models share and by their shapes. Works on meta tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from bertology_serve.errors import Unsupported
from bertology_serve.families.compat import BUILDING
from bertology_serve.kinds.slots import (
    ATTENTION_NORM,
    DOWN,
    FFN_NORM,
    FINAL_NORM,
    GATE,
    KEY,
    OUTPUT,
    OUTSIDE,
    QKV,
    QUERY,
    UP,
    UP_GATE,
    VALUE,
    Anatomy,
    Slot,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bertology_serve.families.compat import HiddenModel

_ROLES = {
    QKV: {"Wqkv", "qkv", "qkv_proj", "in_proj"},
    QUERY: {"query", "q_lin", "q", "query_proj", "q_proj"},
    KEY: {"key", "k_lin", "k", "key_proj", "k_proj"},
    VALUE: {"value", "v_lin", "v", "value_proj", "v_proj"},
    GATE: {"gate_proj"},
    "global_query": {"query_global"},
    "global_key": {"key_global"},
    "global_value": {"value_global"},
    "position_key": {"pos_key_proj"},
    "position_query": {"pos_query_proj"},
}
# DeBERTa (v1) projects positions and mixes heads by linears that no token's row goes through: no delta changes them.
_BESIDE_THE_ROWS = {"pos_proj", "pos_q_proj", "head_logits_proj", "head_weights_proj"}
_ATTENTION = re.compile(r"(^|\.)(attention|attn|self_attn|sa_layer_norm|attn_norm)(\.|$)")
EXPECTED = (
    "expected a BERT-like encoder: bert, roberta, xlm-roberta, camembert, distilbert, electra, albert, mpnet, "
    "deberta-v2, modernbert, eurobert, gte, nomic_bert, jina_embeddings_v3, or another whose layers are built alike"
)
_OUTSIDE = dict(zip(OUTSIDE, map(re.compile, (
    r"(^|\.)embeddings\.(LayerNorm|norm|layer_norm)$",
    r"(embeddings_project|embedding_hidden_mapping_in|embed_proj)$",
    r"(^|\.)(final_norm|final_layer_norm|ln_f)$",
    r"^encoder\.LayerNorm$",
    r"(^|\.)conv\.conv$",
    r"(^|\.)conv\.LayerNorm$",
)), strict=True))  # fmt: skip


def find_anatomy(model: HiddenModel) -> Anatomy:
    """The anatomy of a headless HuggingFace encoder; raises Unsupported if it is not BERT-like.

    Where layers share their weights (ALBERT), ``layers`` counts those that have weights of their own.
    """
    config = model.config
    stack_path, stack = _layer_stack(model)
    hidden = int(config.hidden_size)
    slots = {slot.name: slot for slot in _layer_slots(stack_path, stack, hidden)}
    slots |= {slot.name: slot for slot in _outside_slots(model, stack_path)}
    missing = {QUERY, KEY, VALUE, OUTPUT, UP, DOWN} - slots.keys()
    if missing:
        raise Unsupported(
            f"{config.model_type}: found no {', '.join(sorted(missing))} projection in {stack_path}.0; {EXPECTED}"
        )
    offset = _position_offset(model)
    rotary = FINAL_NORM in slots
    return Anatomy(
        family=config.model_type,
        prefix=model.base_model_prefix,
        layers=len(stack),
        hidden=hidden,
        heads=int(config.num_attention_heads),
        embedding_width=int(model.get_input_embeddings().embedding_dim),
        max_tokens=int(config.max_position_embeddings) - offset,
        position_offset=offset,
        pre_norm=rotary,
        slots=slots,
    )


def _position_offset(model: nn.Module) -> int:
    """The position of the first token: RoBERTa and its kin number from behind the padding's row of their table."""
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    ]
    if not stacks:
        raise Unsupported(f"{type(model).__name__} has no stack of layers; {EXPECTED}")
    return max(stacks, key=lambda found: len(found[1]))


def _layer_slots(stack_path: str, stack: nn.ModuleList, hidden: int) -> Iterator[Slot]:
    """The slots of the layers: roles found in any layer, with the path of each layer that has the module."""
    roles = [_roles_of(layer, hidden) for layer in stack]
    names = dict.fromkeys(name for layer in roles for name in layer)
    for name in names:
        modules = [layer[name][1] if name in layer else None for layer in roles]
        paths = tuple(f"{stack_path}.{i}.{layer[name][0]}" if name in layer else None for i, layer in enumerate(roles))
        yield from _slots_of(name, paths, modules)


def _slots_of(name: str, paths: tuple[str | None, ...], modules: Sequence[nn.Module | None]) -> Iterator[Slot]:
    slices = {QKV: (QUERY, KEY, VALUE), UP_GATE: (UP, GATE)}.get(name, ())
    whole = _slot(name, paths, modules)
    yield whole
    width = whole.outputs // max(1, len(slices))
    for i, part in enumerate(slices):
        yield Slot(part, paths, whole.inputs, width, whole.has_bias, (i * width, (i + 1) * width))


def _slot(name: str, paths: tuple[str | None, ...], modules: Sequence[nn.Module | None]) -> Slot:
    has_bias = getattr(next(filter(None, modules)), "bias", None) is not None
    sizes = tuple(_size(module) if module is not None else (0, 0) for module in modules)
    inputs, outputs = (max(side) for side in zip(*sizes, strict=True))
    differ = len({size for size, module in zip(sizes, modules, strict=True) if module is not None}) > 1
    return Slot(name, paths, inputs, outputs, has_bias, sizes=sizes if differ else ())


def _size(module: nn.Module) -> tuple[int, int]:
    """(K, N); norms and convolutions have a bias only, and so no K."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv1d):
        return 0, module.out_channels
    assert isinstance(module, nn.LayerNorm)
    return 0, module.weight.numel()


def _roles_of(layer: nn.Module, hidden: int) -> dict[str, tuple[str, nn.Module]]:
    """Path and module of one layer's linears and norms, by role; raises Unsupported where two linears have one role."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for role, path, module in _named_roles(layer, hidden):
        if role in found and isinstance(module, nn.Linear):
            raise Unsupported(
                f"{type(layer).__name__} has two {role} projections, {found[role][0]} and {path}; {EXPECTED}"
            )
        found[role] = path, module
    return found


def _named_roles(layer: nn.Module, hidden: int) -> Iterator[tuple[str, str, nn.Module]]:
    linears = [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
    norms = [(path, module) for path, module in layer.named_modules() if _is_norm(module)]
    down = next((m for p, m in reversed(linears) if not _ATTENTION.search(p) and m.out_features == hidden), None)
    for path, module in linears:
        leaf = path.rsplit(".", 1)[-1]
        if leaf in _BESIDE_THE_ROWS:
            continue
        role = next((role for role, names in _ROLES.items() if leaf in names), None)
        if role is None and _ATTENTION.search(path):
            role = OUTPUT
        elif role is None and module is down:
            role = DOWN
        elif role is None and down is not None:
            role = UP_GATE if module.out_features == 2 * down.in_features else UP
        if role is not None:
            yield role, path, module
    for path, module in norms:
        behind_attention = _ATTENTION.search(path) or path.endswith("post_attention_layernorm")
        yield (ATTENTION_NORM if behind_attention else FFN_NORM), path, module


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


def _outside_slots(model: nn.Module, stack_path: str) -> Iterator[Slot]:
    for path, module in model.named_modules():
        if path.startswith(stack_path + "."):
            continue
        for name, pattern in _OUTSIDE.items():
            if pattern.search(path) and isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv1d):
                yield _slot(name, (path,), [module])


def attention_modules(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The module of each layer that holds the query projection and calls attention."""
    return [model.get_submodule(str(path).rpartition(".")[0]) for path in anatomy.slot(QUERY).paths]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path."""
    return model.get_submodule(path)


def empty_model(config: PretrainedConfig) -> HiddenModel:
    """The headless encoder of a HuggingFace config on the meta device: shapes without memory."""
    from transformers import AutoModel

    with BUILDING, torch.device("meta"):
        model: HiddenModel = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        return model
