"""The kinds of delta, by name. ``probe`` (a head alone) is a delta without components; ``full`` a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bertology_serve.errors import SpecError, nearest
from bertology_serve.kinds.adapter import ADAPTER
from bertology_serve.kinds.bitfit import BITFIT
from bertology_serve.kinds.effects import Effects, merged
from bertology_serve.kinds.ia3 import IA3
from bertology_serve.kinds.kind import AnyKind, Kind, S, Spec, Tensors
from bertology_serve.kinds.lora import LORA
from bertology_serve.kinds.norms import NORMS
from bertology_serve.kinds.peft_format import Config
from bertology_serve.kinds.prefix import PREFIX
from bertology_serve.kinds.prompt import PROMPT
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.kinds.sparse import SPARSE
from bertology_serve.kinds.vera import VERA

KINDS: dict[str, AnyKind] = {
    kind.name: kind for kind in (LORA, BITFIT, ADAPTER, PROMPT, PREFIX, IA3, NORMS, VERA, SPARSE)
}
_BY_SPEC = {kind.spec: kind for kind in KINDS.values()}


def kind_named(name: str) -> AnyKind:
    """The kind of that name; raises SpecError naming the nearest known one."""
    if name not in KINDS:
        raise SpecError(f"unknown kind of delta {name!r}; {nearest(name, KINDS)}")
    return KINDS[name]


def kind_of(spec: Spec) -> AnyKind:
    """The kind that a spec belongs to."""
    return _BY_SPEC[type(spec)]


def init(specs: Sequence[Spec], anatomy: Anatomy, generator: torch.Generator | None) -> Tensors:
    """The trainable tensors of all components, named ``kind.name``."""
    names = [kind_of(spec).name for spec in specs]
    if len(set(names)) != len(names):
        raise SpecError(f"a delta holds each kind once; got {', '.join(names)}")
    return {
        f"{kind_of(spec).name}.{name}": tensor
        for spec in specs
        for name, tensor in kind_of(spec).init(spec, anatomy, generator).items()
    }


def effects(specs: Sequence[Spec], tensors: Mapping[str, torch.Tensor], anatomy: Anatomy) -> Effects:
    """What the components do together; differentiable in ``tensors``."""
    return merged(kind_of(spec).effects(spec, _own(kind_of(spec), tensors), anatomy) for spec in specs)


def unpacked(specs: Sequence[Spec], tensors: Mapping[str, torch.Tensor], anatomy: Anatomy) -> int:
    """Bytes that batches read of the components beside their tensors'."""
    return sum(kind.unpacked(spec, _own(kind, tensors), anatomy) for spec in specs if (kind := kind_of(spec)).unpacked)


def _own(kind: AnyKind, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    start = kind.name + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def parameter_count(specs: Sequence[Spec], anatomy: Anatomy) -> int:
    """Trainable parameters of the components, without the head; nothing is allocated."""
    return sum(tensor.numel() for name, tensor in init(specs, anatomy, None).items() if not is_frozen(name))


def from_peft(
    kind: Kind[S], config: Config, tensors: Tensors, anatomy: Anatomy
) -> tuple[S, Tensors]:  # fmt: skip
    """Spec and tensors, named ``kind.name``, of what peft wrote; takes its own out. Raises FormatError, Unsupported."""
    assert not isinstance(kind.peft, str)
    spec, own = kind.peft.load(config, tensors, anatomy)
    return spec, {f"{kind.name}.{name}": tensor for name, tensor in own.items()}


def is_frozen(name: str) -> bool:
    """Whether a tensor called ``kind.name`` is not trained."""
    kind, _, own = name.partition(".")
    return own in KINDS[kind].frozen


def decays(name: str) -> bool:
    """Whether weight decay reaches a tensor called ``kind.name``."""
    return KINDS[name.partition(".")[0]].decays and not name.endswith("_bias")
