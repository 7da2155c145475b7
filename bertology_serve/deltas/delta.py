"""The noun of this project: one trained change of an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from bertology_serve.errors import SpecError
from bertology_serve.files import JsonObject
from bertology_serve.kinds import kinds
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.kinds import Spec
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class BaseRef:
    """The encoder that a delta was made for: what it was called, and the SHA-256 of its weights (hex)."""

    name: str
    sha256: str
    family: str


@dataclass(frozen=True)
class EncoderShape:
    """What it takes to write a delta: the anatomy of the encoder that it was made for, and its configuration.

    ``config`` is HuggingFace's as a dictionary, empty where it is not known; ``peft`` says whether peft's own
    configuration may be written beside the delta.
    """

    anatomy: Anatomy
    config: JsonObject = field(default_factory=dict)
    peft: bool = True


class AnEncoder(Protocol):
    """What ``Delta.save`` reads of an encoder."""

    ref: BaseRef
    anatomy: Anatomy
    config: PreTrainedConfig


@dataclass(frozen=True)
class Delta:
    """Components by kind, a head, a task and where they came from.

    ``specs`` are the kinds' frozen specs; none for a linear probe. ``tensors`` are the components' tensors, float32,
    named ``kind.name`` with layers stacked first (see each kind's ``init``). ``head`` holds the head's own tensors by
    their HuggingFace names; what the base checkpoint has is not in it. ``weights`` is empty but for full fine-tuning,
    where it holds every encoder weight by its name in the headless model. ``made_for`` is what is remembered of the
    encoder, for ``save``.
    """

    name: str
    base: BaseRef
    task: TaskSpec
    specs: tuple[Spec, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    version: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: JsonObject = field(default_factory=dict)
    made_for: EncoderShape | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | Path, encoder: AnEncoder | None = None, *, overwrite: bool = False) -> Path:
        """Writes the delta to a directory, ``ROOT/NAME/VERSION`` or a bare one, whole or not at all; returns it.

        ``load_delta`` reads it back bit for bit. Trained and loaded deltas remember the encoder that they were made
        for, others need it. Raises SpecError where it is needed, BaseMismatch for another encoder, FormatError for a
        delta that could not be loaded again, and where another one lies at ``path`` and is not to be overwritten.
        """
        from bertology_serve.deltas import store  # which is made of deltas
        from bertology_serve.deltas.layout import check_base

        shape = self.made_for
        if encoder is not None:
            if not self.weights:
                check_base(self, encoder.ref)
            shape = EncoderShape(encoder.anatomy, encoder.config.to_dict())
        if shape is None:
            raise SpecError(f"delta {self.name!r} does not know its encoder; give it: delta.save(path, encoder)")
        return store.save(self, Path(path), shape.anatomy, shape.config, overwrite=overwrite, peft=shape.peft)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds: ``("probe",)`` for a head alone, ``("full",)`` for a whole checkpoint."""
        if self.weights:
            return ("full",)
        return tuple(kinds.kind_of(spec).name for spec in self.specs) or ("probe",)

    @property
    def columns(self) -> dict[str, str]:
        """The columns of its training data that held the fields, by field, where they were called otherwise."""
        train = self.provenance.get("train")
        found = train.get("columns") if isinstance(train, Mapping) else None
        pairs = found.items() if isinstance(found, Mapping) else ()
        return {field: column for field, column in pairs if isinstance(column, str)}

    def effects(self, anatomy: Anatomy) -> Effects:
        """What the delta does to an encoder of that anatomy. Stacks are float32, [L, ...] by slot; see
        ``kinds.effects``. Raises SpecError where the encoder lacks a slot.
        """
        return kinds.effects(self.specs, self.tensors, anatomy)

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes, head included."""
        groups = (self.tensors, self.head, self.weights)
        return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())

    def resident_bytes(self, anatomy: Anatomy) -> int:
        """Size of what a batch reads of it, in an encoder of that anatomy."""
        return self.bytes + kinds.unpacked(self.specs, self.tensors, anatomy)


def bare(name: str, base: BaseRef, task: TaskSpec) -> Delta:
    """The base itself as a delta without any change."""
    return Delta(name, base, task, version=base.sha256[:12])
