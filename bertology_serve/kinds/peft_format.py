"""How peft stores a kind: the terms in which each kind's file says it, and what those files share.

Slots that are slices of one packed module (query and value of ModernBERT's Wqkv) share the module's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.nn import functional as F

from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds.effects import Layers
from bertology_serve.kinds.kinds import Tensors
from bertology_serve.kinds.slots import LINEAR_SLOTS, Anatomy

S = TypeVar("S")
MODEL_ROOT, PROMPT_ROOT = "base_model.model.", "base_model."
PROMPT_EMBEDDINGS = "prompt_embeddings"
MERGE = "merge it with peft (merge_and_unload), save the whole model, and convert that directory"

Config = Mapping[str, Any]
"""The values of an ``adapter_config.json``."""


@dataclass(frozen=True)
class PeftFormat(Generic[S]):
    """One method of peft's.

    ``method`` is its ``peft_type``. ``write(spec, own, anatomy, root)`` gives a delta's tensors under peft's names,
    which begin with ``root``; ``read(spec, written, anatomy, root)`` is its inverse and takes what it reads out of
    ``written``. ``config(spec, anatomy, root)`` is the method's part of ``adapter_config.json``. ``load(config,
    tensors, anatomy)`` makes spec and tensors of what peft itself wrote, and takes them out of ``tensors``; a
    module's names end with ``leaf``, and ``settings`` are those that it reads or that leave the function alone.
    ``obstacle(spec, anatomy)`` says why peft does not compute the same; empty where it does. Of the ``virtual`` ones,
    whose tensor is called ``prompt_embeddings``, a delta in peft's form has one.
    """

    method: str
    write: Callable[[S, Mapping[str, Tensor], Anatomy, str], Tensors]
    read: Callable[[S, Tensors, Anatomy, str], Tensors]
    config: Callable[[S, Anatomy, str], JsonObject]
    load: Callable[[Config, Tensors, Anatomy], tuple[S, Tensors]]
    leaf: str = ""
    settings: frozenset[str] = frozenset()
    obstacle: Callable[[S, Anatomy], str] = lambda spec, anatomy: ""
    virtual: bool = False


@dataclass(frozen=True)
class Block:
    """One slot's share of a module: rows ``lo`` to ``hi`` of its output, at ``index`` of the slot's stack.

    In a pruned encoder the stack may be wider than the module, whose inputs are ``inputs``.
    """

    slot: str
    index: int
    lo: int
    hi: int
    inputs: int

    @property
    def width(self) -> int:
        """N of the slot in this layer."""
        return self.hi - self.lo


def modules(reached: Iterable[tuple[str, tuple[int, ...]]], anatomy: Anatomy) -> dict[str, list[Block]]:
    """The modules of slots in the layers of their stacks, by path, with the slots that share each."""
    found: dict[str, list[Block]] = {}
    for name, layers in reached:
        slot = anatomy.slot(name)
        for index, layer in enumerate(layers):
            lo, hi = slot.part or (0, slot.outputs_of(layer))
            path = slot.paths[layer]
            if path is None:
                raise Unsupported(f"layer {layer} of {anatomy.family} has no {name}; choose other layers or targets")
            found.setdefault(path, []).append(Block(name, index, lo, hi, slot.inputs_of(layer)))
    return found


def places(anatomy: Anatomy) -> dict[str, tuple[str, int]]:
    """Slot and layer of every whole linear module, by path."""
    whole = [slot for slot in anatomy.slots.values() if slot.name in LINEAR_SLOTS and slot.part is None]
    return {path: (slot.name, layer) for slot in whole for layer, path in enumerate(slot.paths) if path is not None}


def named_layers(found: Iterable[int], anatomy: Anatomy) -> Layers:
    """The layers that a checkpoint reaches, as a spec names them."""
    layers = tuple(sorted(set(found)))
    return None if len(layers) in (0, anatomy.layers) else layers


def path_of(module: str, anatomy: Anatomy, known: Mapping[str, object]) -> str | None:
    """A module's path in the headless encoder, ``None`` for what is no linear of a layer."""
    return next((path for path in (module, module.removeprefix(f"{anatomy.prefix}.")) if path in known), None)


def unknown(module: str, anatomy: Anatomy) -> Unsupported:
    """The error for a module that is no linear of a layer, or one that no delta changes."""
    return Unsupported(f"{module[:120]!r} is no linear projection that deltas of {anatomy.family} change; {MERGE}")


def taken(tensors: Tensors, leaf: str) -> dict[str, Tensor]:
    """Takes the tensors whose names end with ``leaf`` out, by what stands between ``MODEL_ROOT`` and that."""
    names = [name for name in tensors if name.endswith(leaf)]
    return {name.removeprefix(MODEL_ROOT).removesuffix(leaf): tensors.pop(name) for name in names}


def take(written: Tensors, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Removes and returns a tensor; FormatError when it is missing or of another shape."""
    if name not in written:
        raise FormatError(f"the tensor {name!r} is missing; expected {list(shape) if shape else 'it'}")
    found = written.pop(name)
    if shape is not None and tuple(found.shape) != shape:
        raise FormatError(f"the tensor {name!r} has shape {list(found.shape)}; expected {list(shape)}")
    return found


def number(value: object, name: str) -> float:
    """A setting that is a number; raises FormatError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise FormatError(f"{name} is {repr(value)[:60]}; expected a number")
    return float(value)


def width(path: str, anatomy: Anatomy) -> int:
    """The number of outputs of the whole module at a path, of which a slot may be a slice."""
    found = [slot for slot in anatomy.slots.values() if path in slot.paths]
    return max((slot.part or (0, slot.outputs_of(slot.paths.index(path))))[1] for slot in found)


def padded(rows: Tensor, width: int) -> Tensor:
    """Zeros behind the columns, up to the stack's width."""
    return F.pad(rows, (0, width - rows.shape[-1])) if rows.shape[-1] < width else rows


def check_rest(rest: Tensor, name: str) -> None:
    """Raises FormatError where something is left that belongs to no slot."""
    if rest.any():
        raise FormatError(f"the tensor {name!r} changes outputs that the delta's slots do not reach; save it again")


def targets(paths: Iterable[str], anatomy: Anatomy, root: str) -> list[str]:
    """Module names as people write them (``query``) where these mean the same modules, else full names."""
    chosen = list(paths)
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in chosen))
    all_paths = {path for slot in anatomy.slots.values() for path in slot.paths if path}
    everywhere = {path for path in all_paths if path.rpartition(".")[2] in leaves}
    return leaves if everywhere == set(chosen) and "dense" not in leaves else [root + path for path in chosen]


def virtual_sizes(length: int, anatomy: Anatomy) -> dict[str, int]:
    """What peft's configuration says of virtual tokens."""
    return {
        "num_virtual_tokens": length,
        "num_layers": anatomy.layers,
        "num_attention_heads": anatomy.heads,
        "num_transformer_submodules": 1,
    }
