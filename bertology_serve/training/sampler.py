"""The order of examples: a seeded permutation an epoch, and a place in it that three numbers describe."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Sampler:
    """Hands out indices 0..count-1, each once an epoch. ``seed``, ``epoch`` and ``offset`` are its whole state."""

    count: int
    seed: int
    epoch: int = 0
    offset: int = 0
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
            self._order = (self.epoch, torch.randperm(self.count, generator=generator).tolist())
        return self._order[1]
