"""The noun of this project: one trained change of an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bertology_serve.kinds import kinds
from bertology_serve.kinds.effects import Effects
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.spec import EMBEDDING, TaskSpec


@dataclass(frozen=True)
class BaseRef:
    """The encoder that a delta was made for: what it was called, and the SHA-256 of its weights (hex)."""

    name: str
    sha256: str
    family: str


@dataclass(frozen=True)
class Delta:
    """Components by kind, a head, a task and where they came from.

    ``specs`` are the kinds' frozen specs; none for a linear probe. ``tensors`` are the components' tensors, float32,
    named ``kind.name`` with layers stacked first (see each kind's ``init``). ``head`` holds the head's own tensors by
    their HuggingFace names; what the base checkpoint has is not in it. ``weights`` is empty but for full fine-tuning,
    where it holds every encoder weight by its name in the headless model.
    """

    name: str
    base: BaseRef
    task: TaskSpec
    specs: tuple[Any, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    version: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

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
        """What the delta does to an encoder of that anatomy."""
        return kinds.effects(self.specs, self.tensors, anatomy)

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes, head included."""
        groups = (self.tensors, self.head, self.weights)
        return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())

    def resident_bytes(self, anatomy: Anatomy) -> int:
        """Size of what a batch reads of it, in an encoder of that anatomy."""
        return self.bytes + kinds.unpacked(self.specs, self.tensors, anatomy)


def bare(name: str, base: BaseRef, max_length: int) -> Delta:
    """The base itself as a delta without any change: mean-pooled, normalised embeddings."""
    task = TaskSpec(EMBEDDING, max_length=max_length, pooling="mean", head="none")
    return Delta(name, base, task, version=base.sha256[:12])
