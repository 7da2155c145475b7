"""Attention of the rows of a batch to their own sequence, and what families add: rotations, distances, windows."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from bertology_serve.export.direct.modules import Modules
from bertology_serve.export.direct.nodes import LOWEST, Value, counted, joined
from bertology_serve.export.direct.rows import Rows

NATIVE_SINCE = 23
"""The opset from which ONNX has an attention of its own."""
SLIDING = "sliding_attention"


class Attention:
    """``softmax(q kᵀ / √D + mask) v`` in the grid [B, R], prefixes in front of the keys."""

    def __init__(self, modules: Modules, rows: Rows) -> None:
        self.modules, self.rows, self.nodes, self.parts = modules, rows, modules.nodes, modules.parts
        self.width = self.parts.anatomy.head_width

    def __call__(self, layer: int, query: Value, key: Value, value: Value) -> Value:
        """query, key, value [T, H] -> [T, H]; H as wide as the layer's heads."""
        if self.parts.anatomy.family == "modernbert":
            query, key = self._rotated(query, layer), self._rotated(key, layer)
        return self.grids(layer, *(self.grid(layer, x) for x in (query, key, value)))

    def grid(self, layer: int, x: Value) -> Value:
        """[T, H] -> [B, heads, R, D]."""
        return self.rows.grid(x, self.parts.anatomy.heads_of(layer), self.width)

    def grids(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """q, k, v [B, heads, R, D], rotated already -> [T, H]."""
        out = self._prefixed(layer, q, k, v, self._mask(layer))
        return self.rows.flat(out, self.parts.anatomy.heads_of(layer), self.width)

    def _prefixed(self, layer: int, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """q, k, v [B, heads, R, D], the delta's prefix put before k and v -> [B, heads, R, D]."""
        if self.parts.effects.prefix is not None:
            k, v, mask = self._before(layer, "keys", k), self._before(layer, "values", v), self._opened(mask)
        return self._attended(q, k, v, mask)

    def _attended(self, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """q [B, heads, R, D]; k, v [B, heads, V + R, D] -> [B, heads, R, D]."""
        scale = self.width**-0.5
        if self.nodes.opset >= NATIVE_SINCE:
            return self.nodes("Attention", q, k, v, self._square(mask), scale=scale)
        return self.nodes("Softmax", q * scale @ k.transpose(0, 1, 3, 2) + mask, axis=-1) @ v

    def _mask(self, layer: int) -> Value:
        """[B, 1 or heads, 1 or R, R], the lowest float where a row may not look, distances' biases added.

        Not minus infinity: rows of padding that see nothing would be NaN.
        """
        may = self.rows.seen.unsqueeze(1, 2)
        config = self.parts.config
        if getattr(config, "layer_types", None) and config.layer_types[layer] == SLIDING:
            may = may & (self.nodes("Abs", self._apart) <= config.sliding_window)
        mask = may.where(0.0, LOWEST)
        return mask + self._relative() if self.parts.anatomy.family == "mpnet" else mask

    def _square(self, mask: Value) -> Value:
        """The mask with R rows, which ONNX Runtime's own attention wants."""
        return self.nodes("Expand", mask, self.nodes("Concat", self.rows.columns, [1], axis=0))

    @property
    def _apart(self) -> Value:
        """[R, R]: row i's column less row j's."""
        column = counted(self.nodes, self.rows.columns)
        return column.unsqueeze(1) - column.unsqueeze(0)

    def _relative(self) -> Value:
        """[1, heads, R, R]: MPNet's bias for the distance between two rows, from a table of all distances."""
        most = self.parts.anatomy.max_tokens + self.rows.prompt
        encoder: Any = MPNetEncoder
        buckets = encoder.relative_position_bucket(-torch.arange(1 - most, most))
        table = self.modules.own("encoder.relative_attention_bias.weight")
        assert table is not None
        biases = table.gather(self.nodes.constant(buckets.numpy()))
        return biases.gather(self._apart + (most - 1)).transpose(2, 0, 1).unsqueeze(0)

    def _rotated(self, x: Value, layer: int) -> Value:
        """Rotary positions (Su et al. 2021): halves (a, b) of each head become (a cos - b sin, b cos + a sin)."""
        config = self.parts.config
        rates, _ = ModernBertRotaryEmbedding.compute_default_rope_parameters(config, None, config.layer_types[layer])
        angles = self.rows.positions.real().unsqueeze(1, 2) * self.nodes.constant(rates.numpy())
        cos, sin = self.nodes("Cos", angles), self.nodes("Sin", angles)
        heads = self.parts.anatomy.heads_of(layer)
        a, b = x.reshape(-1, heads, self.width).split(2, axis=2)
        return joined(2, a * cos - b * sin, b * cos + a * sin).reshape(-1, heads * self.width)

    def _before(self, layer: int, part: str, after: Value) -> Value:
        """The prefix's rows [V, H] in front of [B, heads, R, D]."""
        prefix = self.parts.effects.prefix
        assert prefix is not None
        heads = self.parts.anatomy.heads_of(layer)
        trained = (prefix.keys if part == "keys" else prefix.values)[layer, :, : heads * self.width]
        by_head = trained.reshape(1, trained.shape[0], heads, self.width).transpose(1, 2)
        rows = self.modules.mine(f"prefix.{layer}.{part}", by_head)
        everywhere = self.nodes("Concat", self.rows.batch, [1], [1], [1], axis=0)
        return joined(2, self.nodes("Expand", rows, everywhere), after)

    def _opened(self, mask: Value) -> Value:
        """The mask with zeros for the prefix, which every row sees."""
        prefix = self.parts.effects.prefix
        assert prefix is not None
        return self.nodes("Pad", mask, [0, 0, 0, int(prefix.keys.shape[1]), 0, 0, 0, 0], 0.0)
