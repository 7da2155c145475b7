"""Attention over padded rows [B, R], as the exported graph does it: a few matrix products and one softmax.

The same values as ``encoder.attention`` has for packed rows. Families that go through transformers' attention
interface call ``_attend``; MPNet and DeBERTa, which ignore it, get forwards of their own (``families``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "bertology_dense"


class Scene:
    """What the attention modules of one graph look at while a batch passes through them."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._masks: dict[int | None, Tensor] = {}

    def enter(self, seen: Tensor) -> None:
        """A batch begins: ``seen`` [B, R] is true for rows that are no padding."""
        self._seen, self._masks = seen, {}

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, 1 or R, R], 0 where a row may look and the lowest float where not; made once a batch.

        Not minus infinity: rows of padding that see nothing would be NaN and spread.
        """
        assert self._seen is not None
        if window not in self._masks:
            may = self._seen[:, None, None, :]
            if window is not None:
                at = torch.arange(self._seen.shape[1])
                may = may & ((at[:, None] - at[None, :]).abs() <= window)
            self._masks[window] = torch.zeros(()).masked_fill(~may, torch.finfo(torch.float32).min)
        return self._masks[window]


class PrefixRows(nn.Module):
    """The trained keys and values of one layer, [1, heads, V, D] each."""

    def __init__(self, keys: Tensor, values: Tensor, heads: int) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(_by_head(rows, heads), requires_grad=False) for rows in (keys, values))

    @property
    def length(self) -> int:
        """V."""
        return self.keys.shape[2]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    return rows.detach().float().view(1, rows.shape[0], heads, -1).transpose(1, 2).contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scene: Scene,
    prefix: PrefixRows | None,
    *,
    scale: float,
    window: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query, key, value [B, heads, R, D]; ``bias`` [B or 1, heads, R, R] is added to the scaled scores.

    ``window`` lets a row see only rows at most that far away; the prefix is always seen. Returns [B, R, heads, D].
    """
    mask = scene.mask(window)
    if bias is not None:
        mask = mask + bias
    if prefix is not None:
        batch = (query.shape[0], -1, -1, -1)
        key = torch.cat([prefix.keys.expand(batch), key], 2)
        value = torch.cat([prefix.values.expand(batch), value], 2)
        mask = F.pad(mask, (prefix.length, 0))
    scores = (query * scale) @ key.transpose(-1, -2) + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [B, heads, R, D] -> [B, R, heads, D]."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = None if sliding_window is None else sliding_window - 1
    return attend(query, key, value, module.scene, module.prefix_rows, scale=scale, window=window), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The scene has the mask."""


def register() -> str:
    """Makes this attention known to transformers, under the name returned; calling it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
    return NAME
