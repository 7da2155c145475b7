"""The data of a run: its sources, the targets and order of its items, and how a batch is cut into micro-batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from bertology_serve.data.records import DataLike, Record, name_of, read_records
from bertology_serve.tasks.base import Item, Task
from bertology_serve.tasks.classification import LabelTask
from bertology_serve.tasks.spec import VECTOR_KINDS, ZERO_SHOT
from bertology_serve.training.train_config import TrainConfig


def shaped(task: Task, items: list[Item], config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """Training items with what the configuration adds to their targets: class weights and label smoothing, a loss, the
    labels that a text is compared with.
    """
    if task.kind == ZERO_SHOT:
        from bertology_serve.tasks.zero_shot import ZeroShot

        own = cast(ZeroShot, task)
        labels = [own.encode_beside(text, tokenizer) for text in own.beside(cast(Any, items[0].example))]
        drawn = own.drawn([item.target for item in items], config.optim.seed)
        return [
            replace(
                item, target=target, encodings=(*item.encodings, *(labels[one] for one in (target, *target.others)))
            )
            for item, target in zip(items, drawn, strict=True)
        ]
    if task.kind in VECTOR_KINDS:
        from bertology_serve.tasks.embedding import Embedding

        examples: list[Any] = [item.example for item in items]
        targets: Sequence[object] = cast(Embedding, task).aimed(
            examples, [item.target for item in items], config.optim.loss, config.optim.flops
        )
    elif isinstance(task, LabelTask) and (config.optim.balance or config.optim.label_smoothing):
        targets = task.shaped([item.target for item in items], config.optim.balance, config.optim.label_smoothing)
    else:
        return items
    return [replace(item, target=target) for item, target in zip(items, targets, strict=True)]


def micro_batches(items: Sequence[Item], max_tokens: int, padded: bool) -> list[list[Item]]:
    """Groups of items of like length, shortest first, each of at most ``max_tokens`` rows (or a single item).

    ``padded``: every sequence takes as many rows as the longest of its group.
    """
    groups: list[list[Item]] = []
    rows = sequences = 0
    for item in sorted(items, key=lambda item: item.longest):
        sequences += len(item.encodings)
        rows = sequences * item.longest if padded else rows + item.tokens
        if not groups or rows > max_tokens:
            groups.append([])
            sequences = len(item.encodings)
            rows = sequences * item.longest if padded else item.tokens
        groups[-1].append(item)
    return groups


@dataclass(frozen=True)
class Buckets:
    """Batches of like length: those of each ``window`` batches of ``size`` are sorted by ``lengths`` and cut anew."""

    lengths: Sequence[int]
    size: int
    window: int

    def order(self, drawn: Sequence[int], generator: torch.Generator) -> list[int]:
        """A permutation of the same indices; its batches are shuffled, and what fills no batch stays at the end."""
        whole, step = len(drawn) - len(drawn) % self.size, self.size * self.window
        windows = (drawn[start : min(start + step, whole)] for start in range(0, whole, step))
        near = [index for window in windows for index in sorted(window, key=self.lengths.__getitem__)]
        firsts = torch.randperm(whole // self.size, generator=generator).mul(self.size).tolist()
        return [index for first in firsts for index in near[first : first + self.size]] + list(drawn[whole:])


@dataclass
class Sampler:
    """Hands out indices 0..count-1, each once an epoch. ``seed``, ``epoch`` and ``offset`` are its whole state."""

    count: int
    seed: int
    epoch: int = 0
    offset: int = 0
    buckets: Buckets | None = None
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)

    def take(self, size: int) -> list[int]:
        """The next ``size`` indices, fewer at the end of an epoch; after its last batch the next epoch begins."""
        chosen = self._permutation()[self.offset : self.offset + size]
        self.offset += len(chosen)
        if self.offset >= self.count:
            self.epoch, self.offset = self.epoch + 1, 0
        return chosen

    def _permutation(self) -> list[int]:
        if self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            drawn = torch.randperm(self.count, generator=generator).tolist()
            self._order = (self.epoch, self.buckets.order(drawn, generator) if self.buckets else drawn)
        return self._order[1]


@dataclass(frozen=True)
class Source:
    """Records, the name of the file or data set that they came from, and the columns that held their fields.

    ``skipped`` says of each record that was left out where it stood and what was wrong with it.
    """

    name: str
    records: Sequence[Record]
    columns: Mapping[str, str] = field(default_factory=dict)
    skipped: Sequence[str] = ()

    @classmethod
    def read(cls, data: DataLike, columns: Mapping[str, str] | None = None) -> Source:
        """All records of a file, a data set or what is in memory; see ``read_records``."""
        return cls(name_of(data), read_records(data, columns), columns or {})

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the fields of all records, in order."""
        digest = hashlib.sha256()
        for fields, _ in self.records:
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """What two equal sources have in common."""
        return f"{len(self.records)} rows, sha256 {self.sha256[:12]}"

    def facts(self) -> dict[str, object]:
        """Name, rows and hash, columns where any were named, and how many were skipped, for provenance."""
        facts = {"name": self.name, "rows": len(self.records), "sha256": self.sha256}
        more = {"columns": dict(self.columns), "skipped": len(self.skipped)}
        return facts | {name: value for name, value in more.items() if value}


@dataclass(frozen=True)
class Data:
    """The sources of a run: ``dev`` chooses the state that is kept, ``ood``, of another domain, is only measured."""

    train: Source
    dev: Source | None = None
    ood: Source | None = None

    @property
    def skipped(self) -> list[str]:
        """What was wrong with the records that were left out."""
        return [why for source in (self.train, self.dev, self.ood) if source for why in source.skipped]

    def names(self, backbone: str) -> dict[str, str]:
        """The backbone and the sources by the names of their flags."""
        named = {"backbone": backbone, "train": self.train.name}
        others = {"eval": self.dev, "ood": self.ood}
        return named | {flag: source.name for flag, source in others.items() if source is not None}
