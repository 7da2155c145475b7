"""What is analysed: an encoder, alone or with one delta applied, run on token sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.deltas.layout import check_base
from bertology_serve.encoder.bank import BARE, Entry, LiveBank
from bertology_serve.encoder.batch import PackedBatch, pack
from bertology_serve.encoder.encoder import Encoder, weights_hash
from bertology_serve.encoder.forward_context import Heads
from bertology_serve.encoder.pooling import form_for, layer_rows
from bertology_serve.errors import BaseMismatch
from bertology_serve.kinds.slots import Anatomy
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.spec import Encoding

KEY = "subject"
Advance = Callable[[int, int], None]  # (sequences done, of so many)


def silent(done: int, total: int) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Subject:
    """An encoder with at most one delta; its passes keep nothing between batches."""

    encoder: Encoder
    delta: Delta | None = None

    @classmethod
    def of(
        cls, backbone: str | Encoder | Subject | None, delta: Delta | str | Path | None = None, device: str = "cpu"
    ) -> Subject:
        """From names, directories or what is already loaded; without ``backbone`` the one that the delta names.

        Raises NotFound, FormatError, and BaseMismatch for a delta of other weights.
        """
        if isinstance(backbone, Subject):
            return backbone
        if isinstance(delta, (str, Path)):
            delta = store.load(Path(delta))
        if isinstance(backbone, Encoder):
            encoder = backbone
        elif delta is not None:
            encoder = Encoder.for_delta(delta, backbone, device=device)
        else:
            encoder = Encoder.load(backbone or "minilm", device=device)
        return cls(encoder, delta).checked()

    def checked(self) -> Subject:
        """Itself, the delta fitted to a pruned encoder; raises BaseMismatch where it was made for other weights."""
        if self.delta is None:
            return self
        delta = self.encoder.fitted(self.delta)
        if not delta.weights:
            check_base(delta, self.encoder.ref)
        elif weights_hash(delta.weights) != self.encoder.ref.sha256:
            raise BaseMismatch(f"delta {delta.name!r} is a whole checkpoint; give no other encoder with it")
        return replace(self, delta=delta)

    @property
    def name(self) -> str:
        """``minilm`` or ``minilm + sentiment``."""
        return self.encoder.name if self.delta is None else f"{self.encoder.name} + {self.delta.name}"

    @cached_property
    def pools(self) -> LiveBank:
        """The delta's rows."""
        if self.delta is None or not self.delta.specs:
            return LiveBank([])
        device, dtype = self.encoder.device, self.encoder.dtype
        with torch.inference_mode(False), torch.no_grad():  # made once, used with and without gradients
            moved = {name: tensor.to(device, dtype) for name, tensor in self.delta.tensors.items()}
            effects = replace(self.delta, tensors=moved).effects(self.encoder.anatomy)
            return LiveBank([(KEY, self.encoder.allowed(effects))])

    @property
    def virtual(self) -> int:
        """Rows that the delta's prompt or prefix takes of the encoder's positions, at most."""
        return self.entry.prompt_length + self.entry.prefix_length

    @property
    def entry(self) -> Entry:
        """The delta's place among ``pools``."""
        return self.pools.entries.get(KEY, BARE)

    @cached_property
    def head(self) -> Head:
        """The delta's task head, frozen."""
        assert self.delta is not None
        with torch.inference_mode(False):
            head = Head.build(form_for(self.encoder, self.delta.task), self.encoder.base_head)
            head.load(self.delta.head)
            return head.to(self.encoder.device).eval().requires_grad_(False)

    def pack(self, encodings: Sequence[Encoding]) -> PackedBatch:
        """One batch of sequences, the delta on all of them."""
        encoder = self.encoder
        return pack(encodings, [self.entry] * len(encodings), encoder.anatomy, encoder.device, padded=not encoder.packs)

    def run(self, batch: PackedBatch, heads: Heads | None = None) -> Tensor:
        """The last hidden states [T, H]."""
        return self.encoder.run(batch, self.pools, heads=heads)

    def passes(
        self, encodings: Sequence[Encoding], max_tokens: int
    ) -> Iterator[tuple[Sequence[int], PackedBatch, dict[int, Tensor]]]:
        """Batches of the sequences with the hidden states [T, H] of every layer; see ``layer_rows``."""
        groups = batches([len(encoding) for encoding in encodings], max_tokens)
        layers = range(self.encoder.anatomy.layers + 1)
        return layer_rows(self.encoder, self.pools, self.entry, encodings, groups, layers)

    def facts(self) -> dict[str, Any]:
        """What the report says of it."""
        base, delta = self.encoder.ref, self.delta
        own = None if delta is None else {"name": delta.name, "version": delta.version, "kinds": list(delta.kinds)}
        return {"base": base.name, "family": base.family, "sha256": base.sha256, "delta": own}


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indexes of sequences, shortest first, in batches of at most ``max_tokens`` padded rows (or one sequence)."""
    waiting: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if waiting and (len(waiting) + 1) * lengths[index] > max_tokens:
            yield waiting
            waiting = []
        waiting.append(index)
    if waiting:
        yield waiting


def head_numbers(anatomy: Anatomy) -> list[int]:
    """The flat numbers, ``layer * heads + head``, of the heads that there are: all of them, unless it was pruned."""
    return [layer * anatomy.heads + head for layer in range(anatomy.layers) for head in range(anatomy.heads_of(layer))]


def mapped(values: Tensor, numbers: Sequence[int]) -> list[list[float | None]]:
    """Values [L, heads] for a heat-map: nothing where a pruned layer has no head."""
    there = set(numbers)
    return [
        [value if layer * len(row) + head in there else None for head, value in enumerate(row)]
        for layer, row in enumerate(values.tolist())
    ]


def text_rows(batch: PackedBatch) -> tuple[Tensor, ...]:
    """For each packed sequence, the numbers of its text rows."""
    return torch.split(batch.text_rows, list(batch.text_lengths))
