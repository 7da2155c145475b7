"""Attention as nodes: rotations, relative positions, windows, and the prefixes of deltas."""

from __future__ import annotations

import onnx_ir as ir
import torch

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.export.emitter.module_nodes import Modules
from bertology_serve.export.emitter.nodes import CONTRIB, Value, counted, joined
from bertology_serve.export.emitter.row_nodes import Rows
from bertology_serve.families.compat import deberta_buckets, modernbert_rotation, mpnet_buckets
from bertology_serve.kinds.slots import KEY, OUTPUT, QUERY

NATIVE_SINCE = 23
"""The opset from which ONNX has an attention of its own."""
SLIDING = "sliding_attention"
FLOAT, INT32 = ir.DataType.FLOAT.value, ir.DataType.INT32.value


class Attention:
    """``softmax(q kᵀ / √D + mask) v`` in the grid [B, R], prefixes in front of the keys.

    In fused graphs ONNX Runtime's ``MultiHeadAttention`` does it, which has the grid's rows as [B, R, H].
    """

    def __init__(self, modules: Modules, rows: Rows) -> None:
        self.modules, self.rows, self.nodes, self.updates = modules, rows, modules.nodes, modules.updates
        self.anatomy, self.config = modules.anatomy, modules.config
        self.width = self.anatomy.head_width
        self.positions = modules.positions
        self.disentangled = Disentangled(self) if self.positions == "disentangled" else None
        self.scale: float = (self.width * (self.disentangled.terms if self.disentangled else 1)) ** -0.5

    def __call__(self, layer: int, query: Value, key: Value, value: Value) -> Value:
        """query, key, value [T, H] -> [T, H]; H as wide as the layer's heads."""
        if self.positions == "rotary":
            query, key = self._rotated(query, layer), self._rotated(key, layer)
        return self.grids(layer, *(self.grid(layer, x) for x in (query, key, value)))

    def grid(self, layer: int, x: Value) -> Value:
        """[T, H] -> [B, heads, R, D]; in fused graphs [B, 1, R, H]."""
        heads = self.anatomy.heads_of(layer)
        return self.rows.grid(x, 1, heads * self.width) if self.nodes.fused else self.rows.grid(x, heads, self.width)

    def grids(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """q, k, v as ``grid`` makes them, rotated already -> [T, H]."""
        heads = self.anatomy.heads_of(layer)
        if self.nodes.fused:
            out = self.rows.flat(self._fused(layer, q, k, v).unsqueeze(1), 1, heads * self.width)
            return self.modules.gated(OUTPUT, layer, lambda: out)
        mask = self._mask(layer, q, k)

        def prefixed() -> Value:
            keys, values = self._prefixed(layer, heads, k, v)
            return self._attended(q, keys, values, self._opened(mask, keys))

        out = self.nodes.choose(self.updates.used(PREFIX), prefixed, lambda: self._attended(q, k, v, mask))
        return self.modules.gated(OUTPUT, layer, lambda: self.rows.flat(out, heads, self.width))

    def _prefixed(self, layer: int, heads: int, k: Value, v: Value) -> tuple[Value, Value]:
        """k, v [B, heads, R, width] behind the prefix of their sequence -> [B, heads, V + R, width]."""
        width = self.anatomy.heads_of(layer) * self.width // heads
        return (
            joined(2, self.updates.prefix("k", layer, heads, width), k),
            joined(2, self.updates.prefix("v", layer, heads, width), v),
        )

    def _attended(self, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """q [B, heads, R, D]; k, v [B, heads, V + R, D] -> [B, heads, R, D]."""
        if self.nodes.opset >= NATIVE_SINCE:
            return self.nodes("Attention", q, k, v, self._square(mask), scale=self.scale)
        return self.nodes("Softmax", q * self.scale @ k.transpose(0, 1, 3, 2) + mask, axis=-1) @ v

    def _fused(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """q, k, v [B, 1, R, H] -> [B, R, H].

        By the number of keys of each sequence where that says all, by the mask where windows or distances matter.
        """
        heads, prefixed = self.anatomy.heads_of(layer), self.updates.used(PREFIX) is True
        keys, values = self._prefixed(layer, 1, k, v) if prefixed else (k, v)
        count, bias = None, None
        if self._slides(layer) or self.positions in ("bias", "disentangled"):
            by_head = (x.reshape(self.rows.batch, -1, heads, self.width).transpose(0, 2, 1, 3) for x in (q, k))
            mask = self._mask(layer, *by_head)
            bias = self._square(self._opened(mask, keys) if prefixed else mask)
        else:
            seen = self.rows.text.count + self.rows.layout.most
            count = self.nodes("Cast", (seen + self.updates.prefix_length if prefixed else seen).squeeze(1), to=INT32)
        q, keys, values = (x.squeeze(1) for x in (q, keys, values))
        return self.nodes(
            "MultiHeadAttention", q, keys, values, None, count, bias,
            domain=CONTRIB, num_heads=heads, scale=self.scale,
        )  # fmt: skip

    def _slides(self, layer: int) -> bool:
        """Whether a row sees only those near it."""
        kinds: list[str] | None = getattr(self.config, "layer_types", None)
        return kinds is not None and kinds[layer] == SLIDING

    def _mask(self, layer: int, q: Value, k: Value) -> Value:
        """[B, 1 or heads, 1 or R, R], the lowest float where a row may not look, biases of relative positions added.

        Not minus infinity: rows of padding that see nothing would be NaN. q and k are [B, heads, R, D].
        """
        may = self.rows.seen.unsqueeze(1, 2)
        if self._slides(layer):
            may = may & (self.nodes("Abs", self.apart) <= self.config.sliding_window)
        mask = may.where(0.0, self.nodes.lowest)
        if self.disentangled:
            return mask + self.disentangled(layer, q, k) * self.scale
        return mask + self._relative() if self.positions == "bias" else mask

    def _square(self, mask: Value) -> Value:
        """The mask with R rows, which ONNX Runtime's own attention wants."""
        return self.nodes("Expand", mask, self.nodes("Concat", self.rows.columns, [1], axis=0))

    @property
    def apart(self) -> Value:
        """[R, R]: row i's column less row j's."""
        column = counted(self.nodes, self.rows.columns)
        return column.unsqueeze(1) - column.unsqueeze(0)

    def of_distance(self, table: torch.Tensor) -> Value:
        """[R, R]: entries of ``table`` [2 M - 1], which has the one for a distance d of two of M rows at d + M - 1."""
        return self.nodes.constant(table.numpy()).gather(self.apart + table.shape[0] // 2)

    @property
    def distances(self) -> torch.Tensor:
        """[2 M - 1]: all distances between two of M rows, the most that a sequence can have."""
        most = self.anatomy.max_tokens + self.rows.layout.most
        return torch.arange(1 - most, most)

    def _relative(self) -> Value:
        """[1, heads, R, R]: MPNet's bias for the distance between two rows, from a table of all distances."""
        table = self.modules.own("encoder.relative_attention_bias.weight")
        assert table is not None
        biases = table.gather(self.of_distance(mpnet_buckets(-self.distances)))
        return biases.transpose(2, 0, 1).unsqueeze(0)

    def _rotated(self, x: Value, layer: int) -> Value:
        """Rotary positions (Su et al. 2021): halves (a, b) of each head become (a cos - b sin, b cos + a sin)."""
        rates, factor = modernbert_rotation(self.config, self.config.layer_types[layer])
        positions = self.nodes("Cast", self.rows.positions, to=FLOAT)  # float16 ends at 2048 whole numbers
        angles = positions.unsqueeze(1, 2) * self.nodes.constant(rates.numpy())
        cos, sin = (self.nodes(wave, angles).real() for wave in ("Cos", "Sin"))
        cos, sin = (cos, sin) if factor == 1 else (cos * factor, sin * factor)
        heads = self.anatomy.heads_of(layer)
        a, b = x.reshape(-1, heads, self.width).split(2, axis=2)
        return joined(2, a * cos - b * sin, b * cos + a * sin).reshape(-1, heads * self.width)

    def _opened(self, mask: Value, keys: Value) -> Value:
        """The mask [B, 1 or heads, R, V + R], with columns for the prefixes in front of the keys [B, heads, V + R, D].

        Every row sees the prefix of its own sequence.
        """
        one, rows = self.nodes.value([1]), self.rows.columns
        seen = counted(self.nodes, keys.size(2) - rows).unsqueeze(0) < self.updates.prefix_length
        shape = joined(0, self.rows.batch, mask.size(1), rows, one)
        opened = self.nodes("Expand", seen.where(0.0, self.nodes.lowest).unsqueeze(1, 2), shape)
        return joined(3, opened, self.nodes("Expand", mask, joined(0, self.rows.batch, one, rows, one)))


class Disentangled:
    """DeBERTa's scores of relative positions (He et al. 2021): content to position, and position to content.

    The embeddings of relative positions go through the layer's own projections, so what a delta does to those shows
    here too. ``terms`` counts the scores that are added, those of the content with itself included.
    """

    def __init__(self, attention: Attention) -> None:
        self.attention, self.modules, self.nodes = attention, attention.modules, attention.nodes
        config = attention.config
        self.kinds, self.shared = tuple(config.pos_att_type or ()), bool(getattr(config, "share_att_key", False))
        self.terms = 1 + ("c2p" in self.kinds) + ("p2c" in self.kinds)
        buckets, most = getattr(config, "position_buckets", -1), getattr(config, "max_relative_positions", -1)
        most = config.max_position_embeddings if most < 1 else most
        self.span = buckets if buckets > 0 else most
        distances = attention.distances
        self.apart = (deberta_buckets(distances, buckets, most) if buckets > 0 else distances).long()

    def __call__(self, layer: int, q: Value, k: Value) -> Value:
        """q, k [B, heads, R, D] -> [B, heads, R, R], not yet scaled; 0 without such scores."""
        found = []
        if "c2p" in self.kinds:
            found.append(self._scores(q, self._projected(KEY, layer), 1))
        if "p2c" in self.kinds:
            found.append(self._scores(k, self._projected(QUERY, layer), -1).transpose(0, 1, 3, 2))
        return self.nodes.total(*found) if found else self.nodes.value(0.0)

    def _projected(self, slot: str, layer: int) -> Value:
        """[heads, D, 2 span]: the embeddings of relative positions, normed where the checkpoint does, projected."""
        name = "encoder.rel_embeddings.weight"  # as many as are read: HuggingFace's model makes no more
        rows = self.nodes.weight(name, self.modules.state[name])
        rows = self.modules.norm("relative_norm", 0, rows) if self.modules.has("relative_norm") else rows
        heads, width = self.attention.anatomy.heads_of(layer), self.attention.width
        projected = self.modules.linear(slot if self.shared else f"position_{slot}", layer, rows)
        return projected.reshape(-1, heads, width).transpose(1, 2, 0)

    def _scores(self, x: Value, positions: Value, sign: int) -> Value:
        """x [B, heads, R, D] with the positions of its distances, times ``sign``, to all rows -> [B, heads, R, R]."""
        scores = x @ positions
        index = self.attention.of_distance((sign * self.apart + self.span).clamp(0, 2 * self.span - 1))
        shape = self.nodes("Shape", x, start=0, end=3)
        return self.nodes("GatherElements", scores, self.nodes("Expand", index, joined(0, shape, x.size(2))), axis=-1)
