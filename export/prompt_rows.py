"""The rows of a batch inside the graph: text brought together, padding behind it, a soft prompt woven in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bertology_serve.kinds.effects import PromptEffect


@dataclass(frozen=True)
class Gathered:
    """A batch with all padding at the end: ids, types and ``seen`` [B, L]; ``count`` [B, 1], the rows of text.

    ``home`` [B, L] is where each row of the caller's stands now.
    """

    ids: Tensor
    types: Tensor
    seen: Tensor
    count: Tensor
    home: Tensor


def gather(ids: Tensor, mask: Tensor, types: Tensor) -> Gathered:
    """Moves padding to the end, wherever it was: left and right padding give the same answer in every family."""
    mask = mask.ne(0).long()
    passed = mask.cumsum(1)
    count = passed[:, -1:]
    at = torch.arange(ids.shape[1])
    home = torch.where(mask.bool(), passed - 1, count + at - passed)
    ids, types = (torch.zeros_like(rows).scatter(1, home, rows) for rows in (ids, types))
    return Gathered(ids, types, at < count, count, home)


class PromptLayout(nn.Module):
    """Puts V prompt rows among L rows of text, R = V + L, and takes them out again; V = 0 without a prompt.

    ``offset`` is the position of the first row.
    """

    def __init__(self, prompt: PromptEffect | None, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.length = 0 if prompt is None else int(prompt.vectors.shape[0])
        self.shifts = prompt is not None and prompt.positions == "shifted"
        self.lead = 1 if prompt is not None and prompt.placement == "after_cls" else 0
        reads_prompt = prompt is None or prompt.placement == "after_cls" or prompt.head_reads == "first_row"
        self.first = 0 if reads_prompt else self.length
        self.vectors = None if prompt is None else nn.Parameter(prompt.vectors.detach().to("cpu", torch.float32)[None])

    def embed(self, words: Tensor) -> Tensor:
        """[B, L, E] -> [B, R, E], with the prompt's vectors."""
        return words if self.vectors is None else self._insert(words, self.vectors.expand(words.shape[0], -1, -1))

    def fill(self, rows: Tensor, value: int) -> Tensor:
        """[B, L] -> [B, R], ``value`` at prompt rows."""
        if self.vectors is None:
            return rows
        return self._insert(rows, torch.full((1, self.length), value, dtype=rows.dtype).expand(rows.shape[0], -1))

    def text(self, hidden: Tensor) -> Tensor:
        """[B, R, H] -> [B, L, H]."""
        if self.vectors is None:
            return hidden
        return torch.cat([hidden[:, : self.lead], hidden[:, self.lead + self.length :]], 1)

    def positions(self, tokens: int) -> Tensor:
        """[1, R]: rows numbered as they stand, or, kept, the prompt at the position of [CLS]."""
        if self.vectors is None or self.shifts:
            return torch.arange(tokens + self.length)[None] + self.offset
        return self.fill(torch.arange(tokens)[None], 0) + self.offset

    def _insert(self, rows: Tensor, inserted: Tensor) -> Tensor:
        return torch.cat([rows[:, : self.lead], inserted, rows[:, self.lead :]], 1)
