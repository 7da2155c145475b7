"""Attention as nodes: rotations, distances, windows, and for many deltas a prefix of each sequence's own."""

from __future__ import annotations

import onnx_ir as ir
import torch

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.export.emitter.delta_inputs import LENGTH, Tables
from bertology_serve.export.emitter.module_nodes import Modules
from bertology_serve.export.emitter.nodes import CONTRIB, Value, counted, joined
from bertology_serve.export.emitter.row_nodes import Mixed, Rows
from bertology_serve.families.compat import modernbert_rates, mpnet_buckets
from bertology_serve.kinds.slots import OUTPUT

NATIVE_SINCE = 23
"""The opset from which ONNX has an attention of its own."""
SLIDING = "sliding_attention"
FLOAT, INT32 = ir.DataType.FLOAT.value, ir.DataType.INT32.value


class Attention:
    """``softmax(q kᵀ / √D + mask) v`` in the grid [B, R], prefixes in front of the keys.

    In fused graphs ONNX Runtime's ``MultiHeadAttention`` does it, which has the grid's rows as [B, R, H].
    """

    def __init__(self, modules: Modules, rows: Rows) -> None:
        self.modules, self.rows, self.nodes, self.parts = modules, rows, modules.nodes, modules.parts
        self.width = self.parts.anatomy.head_width

    def __call__(self, layer: int, query: Value, key: Value, value: Value) -> Value:
        """query, key, value [T, H] -> [T, H]; H as wide as the layer's heads."""
        if self.parts.family.positions == "rotary":
            query, key = self._rotated(query, layer), self._rotated(key, layer)
        return self.grids(layer, *(self.grid(layer, x) for x in (query, key, value)))

    def grid(self, layer: int, x: Value) -> Value:
        """[T, H] -> [B, heads, R, D]; in fused graphs [B, 1, R, H]."""
        heads = self.parts.anatomy.heads_of(layer)
        return self.rows.grid(x, 1, heads * self.width) if self.nodes.fused else self.rows.grid(x, heads, self.width)

    def grids(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """q, k, v as ``grid`` makes them, rotated already -> [T, H]."""
        if self.nodes.fused:
            return self._fused(layer, q, k, v)
        out, heads = self._prefixed(layer, q, k, v, self._mask(layer)), self.parts.anatomy.heads_of(layer)
        return self.modules.gated(OUTPUT, layer, lambda: self.rows.flat(out, heads, self.width))

    def _prefixed(self, layer: int, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """q, k, v [B, heads, R, D], the delta's prefix put before k and v -> [B, heads, R, D]."""
        if self.parts.effects.prefix is not None:
            heads = self.parts.anatomy.heads_of(layer)
            k, v = self._before(layer, "keys", k, heads), self._before(layer, "values", v, heads)
            mask = self._opened(mask)
        return self._attended(q, k, v, mask)

    def _attended(self, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """q [B, heads, R, D]; k, v [B, heads, V + R, D] -> [B, heads, R, D]."""
        scale = self.width**-0.5
        if self.nodes.opset >= NATIVE_SINCE:
            return self.nodes("Attention", q, k, v, self._square(mask), scale=scale)
        return self.nodes("Softmax", q * scale @ k.transpose(0, 1, 3, 2) + mask, axis=-1) @ v

    def _fused(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """By the number of keys of each sequence where that says all, by the mask where windows or distances matter."""
        heads, ahead = self.parts.anatomy.heads_of(layer), 0
        if self.parts.effects.prefix is not None:
            ahead = int(self.parts.effects.prefix.keys.shape[1])
            k, v = self._before(layer, "keys", k, 1), self._before(layer, "values", v, 1)
        q, k, v = (x.squeeze(1) for x in (q, k, v))
        count, bias = None, None
        if self._slides(layer) or self.parts.family.positions == "bias":
            mask = self._mask(layer)
            bias = self._square(self._opened(mask) if ahead else mask)
        else:
            keys = (self.rows.text.count + self.rows.prompt + ahead).squeeze(1)
            count = self.nodes("Cast", keys, to=INT32)
        out = self.nodes(
            "MultiHeadAttention", q, k, v, None, count, bias,
            domain=CONTRIB, num_heads=heads, scale=self.width**-0.5,
        )  # fmt: skip
        return self.rows.flat(out.unsqueeze(1), 1, heads * self.width)

    def _slides(self, layer: int) -> bool:
        """Whether a row sees only those near it."""
        kinds: list[str] | None = getattr(self.parts.config, "layer_types", None)
        return kinds is not None and kinds[layer] == SLIDING

    def _mask(self, layer: int) -> Value:
        """[B, 1 or heads, 1 or R, R], the lowest float where a row may not look, distances' biases added.

        Not minus infinity: rows of padding that see nothing would be NaN.
        """
        may = self.rows.seen.unsqueeze(1, 2)
        if self._slides(layer):
            may = may & (self.nodes("Abs", self._apart) <= self.parts.config.sliding_window)
        mask = may.where(0.0, self.nodes.lowest)
        return mask + self._relative() if self.parts.family.positions == "bias" else mask

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
        buckets = mpnet_buckets(-torch.arange(1 - most, most))
        table = self.modules.own("encoder.relative_attention_bias.weight")
        assert table is not None
        biases = table.gather(self.nodes.constant(buckets.numpy()))
        return biases.gather(self._apart + (most - 1)).transpose(2, 0, 1).unsqueeze(0)

    def _rotated(self, x: Value, layer: int) -> Value:
        """Rotary positions (Su et al. 2021): halves (a, b) of each head become (a cos - b sin, b cos + a sin)."""
        config = self.parts.config
        rates = modernbert_rates(config, config.layer_types[layer])
        positions = self.nodes("Cast", self.rows.positions, to=FLOAT)  # float16 ends at 2048 whole numbers
        angles = positions.unsqueeze(1, 2) * self.nodes.constant(rates.numpy())
        cos, sin = self.nodes("Cos", angles).real(), self.nodes("Sin", angles).real()
        heads = self.parts.anatomy.heads_of(layer)
        a, b = x.reshape(-1, heads, self.width).split(2, axis=2)
        return joined(2, a * cos - b * sin, b * cos + a * sin).reshape(-1, heads * self.width)

    def _before(self, layer: int, part: str, after: Value, heads: int) -> Value:
        """The prefix's rows [V, H] in front of [B, heads, R, D]."""
        prefix = self.parts.effects.prefix
        assert prefix is not None
        width = self.parts.anatomy.heads_of(layer) * self.width
        trained = (prefix.keys if part == "keys" else prefix.values)[layer, :, :width]
        by_head = trained.reshape(1, trained.shape[0], heads, width // heads).transpose(1, 2)
        rows = self.modules.mine(f"prefix.{layer}.{part}", by_head)
        everywhere = self.nodes("Concat", self.rows.batch, [1], [1], [1], axis=0)
        return joined(2, self.nodes("Expand", rows, everywhere), after)

    def _opened(self, mask: Value) -> Value:
        """The mask with zeros for the prefix, which every row sees."""
        prefix = self.parts.effects.prefix
        assert prefix is not None
        return self.nodes("Pad", mask, [0, 0, 0, int(prefix.keys.shape[1]), 0, 0, 0, 0], 0.0)


class MixedAttention(Attention):
    """A prefix of V rows stands before the keys of every sequence of a batch, V that of the longest; masked beyond."""

    def __init__(self, modules: Modules, tables: Tables, rows: Mixed) -> None:
        super().__init__(modules, rows)
        self.tables = tables
        self._prefixes = tables.table(PREFIX, "rows").gather(rows.delta)
        self._lengths = tables.table(PREFIX, "form").gather(rows.delta).gather([LENGTH], 1)

    def _prefixed(self, layer: int, q: Value, k: Value, v: Value, mask: Value) -> Value:
        def prefixed() -> Value:
            return self._attended(q, self._behind("k", layer, k), self._behind("v", layer, v), self._wider(mask))

        return self.nodes.choose(self.tables.used(PREFIX, "rows"), prefixed, lambda: self._attended(q, k, v, mask))

    def _behind(self, column: str, layer: int, own: Value) -> Value:
        """The sequences' own keys or values [B, heads, R, D] behind those of their prefixes."""
        rows = self.tables.rows(PREFIX, column, layer, self._prefixes)
        shape = self.nodes("Concat", [0], [0], [self.parts.anatomy.heads_of(layer)], [self.width], axis=0)
        return joined(2, self.nodes("Reshape", rows, shape).transpose(0, 2, 1, 3), own)

    def _wider(self, mask: Value) -> Value:
        """The mask with columns for the prefixes, which every row of their sequence sees."""
        one, rows = self.nodes.value([1]), self.rows.columns
        seen = counted(self.nodes, self._prefixes.size(1)).unsqueeze(0) < self._lengths
        opened = self.nodes(
            "Expand", seen.where(0.0, self.nodes.lowest).unsqueeze(1, 2), joined(0, one, mask.size(1), rows, one)
        )
        return joined(3, opened, self.nodes("Expand", mask, joined(0, one, one, rows, one)))
