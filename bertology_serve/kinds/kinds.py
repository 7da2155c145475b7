"""The kinds of delta: what every one provides, and all of them by name. A new kind is one file beside this one, and
its name in ``NAMES``. ``probe`` (a head alone) is a delta without components; ``full`` a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bertology_serve.config_fields import check_fits
from bertology_serve.errors import SpecError
from bertology_serve.kinds.effects import Effects, Layers, merged
from bertology_serve.kinds.slots import OUTSIDE, Anatomy, Slot
from bertology_serve.tasks.registry import LazyTable

if TYPE_CHECKING:
    from bertology_serve.kinds.peft_format import Config, PeftFormat


Tensors = dict[str, Tensor]


class Spec(Protocol):
    """A kind's frozen dataclass: what the user chooses of it."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


S = TypeVar("S", bound=Spec)
LATER = {"later": True}
"""Of a field that earlier versions of the format do not know: it is written only where it is not as before."""


@dataclass(frozen=True)
class Kind(Generic[S]):
    """One way of changing an encoder.

    ``spec`` is its frozen dataclass. ``init(spec, anatomy, generator)`` draws the trainable tensors (float32; names
    without the kind's own name); with ``generator=None`` they are on the meta device, for counting. ``effects``
    turns spec, tensors and anatomy into what the engines apply. ``cut`` slices tensors made for an anatomy to what
    ``Cut`` leaves of it; a kind without it cannot be taken over by a pruned encoder. ``unpacked`` counts the bytes
    that batches read beside the tensors', where the effects are larger. Weight decay reaches its tensors where it
    ``decays`` (biases aside); those named in ``frozen`` are not trained. ``peft`` is how peft stores it, or why not.
    """

    name: str
    spec: type[S]
    init: Callable[[S, Anatomy, torch.Generator | None], Tensors]
    effects: Callable[[S, Tensors, Anatomy], Effects]
    cut: Callable[[S, Tensors, Anatomy, Cut], Tensors] | None = None
    unpacked: Callable[[S, Tensors, Anatomy], int] | None = None
    decays: bool = True
    frozen: frozenset[str] = frozenset()
    peft: PeftFormat[S] | str = ""


AnyKind = Kind[Any]


class Cut(Protocol):
    """What of a parent's columns is left in an encoder pruned from it: ``stack`` [n, ..., width], a layer each."""

    def inputs(self, stack: Tensor, slot: Slot, layers: Sequence[int]) -> Tensor:
        """The columns of a slot's inputs that are left, zeros behind a narrower layer's."""
        ...

    def outputs(self, stack: Tensor, slot: Slot, layers: Sequence[int]) -> Tensor:
        """The same of its outputs."""
        ...


def uncut(_: Spec, tensors: Tensors, __: Anatomy, ___: Cut) -> Tensors:
    """For kinds that no heads and neurons reach."""
    return tensors


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> Tensor:
    """N(0, std²) in float32, or a meta tensor when only the shape matters."""
    if generator is None:
        return torch.empty(shape, device="meta")
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def zeros(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Zeros in float32, or a meta tensor when only the shape matters."""
    return torch.zeros(shape, device="meta" if generator is None else "cpu")


def check_layers(spec: Spec, layers: Any) -> None:
    """Keeps a spec's ``layers`` as a tuple; raises SpecError unless they are ``None`` or whole numbers from 0."""
    if layers is None:
        return
    known = isinstance(layers, Sequence) and layers and not isinstance(layers, str)
    if not known or any(type(layer) is not int or layer < 0 for layer in layers):
        raise SpecError(f"layers is {layers!r}; expected whole numbers from 0, such as (4, 5), or None for all")
    object.__setattr__(spec, "layers", tuple(layers))


def chosen_layers(layers: Layers, depth: int) -> tuple[int, ...]:
    """The layers that a spec names (``None``: all), checked against the encoder's depth."""
    if layers is None:
        return tuple(range(depth))
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong or list(layers) != sorted(set(layers)):
        raise SpecError(f"layers {list(layers)} must rise and lie in 0..{depth - 1}")
    return layers


def layers_of(layers: Layers, slot: Slot) -> tuple[int, ...]:
    """The layers of a slot's stack that a spec reaches: of those it names (``None``: all) those that have the module.

    A slot outside the layers, as the embeddings' norm, is reached only where no layers are named.
    """
    if layers is None or slot.name in OUTSIDE:
        return slot.present if layers is None else ()
    return tuple(layer for layer in chosen_layers(layers, slot.depth) if layer in slot.present)


def spec_from_dict(kind: Kind[S], values: Mapping[str, Any]) -> S:
    """Builds a spec from JSON or flags; an unknown field is an error that names the nearest known one."""
    check_fits(f"{kind.name} has no field", values, {one.name for one in fields(kind.spec)})
    return kind.spec(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_positive(**values: int | float) -> None:
    """Raises SpecError unless every value is a number above 0."""
    for field, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SpecError(f"{field} is {value!r}; expected a number above 0")


def check_names(**values: object) -> None:
    """Raises SpecError unless every value is several names."""
    for field, names in values.items():
        if not isinstance(names, Sequence) or isinstance(names, str) or any(not isinstance(one, str) for one in names):
            raise SpecError(f"{field} is {names!r}; expected names in a list, such as ['query', 'value']")


def check_share(**values: float) -> None:
    """Raises SpecError unless every value lies in [0, 1)."""
    for field, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise SpecError(f"{field} is {value!r}; expected a number from 0 up to, not including, 1")


NAMES = ("lora", "bitfit", "adapter", "prompt", "prefix", "ia3", "norms", "vera", "sparse")
KINDS: LazyTable[AnyKind] = LazyTable(
    "kind of delta", {name: f"bertology_serve.kinds.{name}:{name.upper()}" for name in NAMES}
)
"""A kind and its spec stand in the file of the kind's name."""
kind_named = KINDS.named


def kind_of(spec: Spec) -> AnyKind:
    """The kind that a spec belongs to."""
    return kind_named(type(spec).__module__.rpartition(".")[2])


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
