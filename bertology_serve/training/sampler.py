"""The order of examples: a seeded permutation an epoch, and a place in it that three numbers describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


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
