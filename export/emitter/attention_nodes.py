"""Attention as nodes: rotations, relative positions, windows, and the prefixes of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from bertology_serve.encoder.bank import PREFIX
from bertology_serve.export.emitter.module_nodes import Modules
from bertology_serve.export.emitter.nodes import CONTRIB, Condition, Value, counted, either, joined
from bertology_serve.export.emitter.row_nodes import Group, Packed, Rows
from bertology_serve.families.compat import deberta_buckets, modernbert_rotation, mpnet_buckets
from bertology_serve.kinds.slots import KEY, OUTPUT, QUERY

SLIDING, RELATIVE = "sliding_attention", "encoder.relative_attention_bias.weight"
FAR_BELOW = -64.0
LONG, BLOCK = 256, 256
"""Above so many columns a grid is worked off by head and sequence, in blocks of so many rows: what lies between the
products then stays in the processor's cache, and memory grows with the length, not with its square."""
FLOAT, INT32 = ir.DataType.FLOAT.value, ir.DataType.INT32.value


class Attention:
    """``softmax(q kᵀ / √D + mask) v`` in the grids of the rows' groups, prefixes in front of the keys.

    In fused graphs ONNX Runtime's ``MultiHeadAttention`` does it, which has the rows of a grid as [B, R, H].
    """

    def __init__(self, modules: Modules, rows: Rows) -> None:
        self.modules, self.rows, self.nodes, self.updates = modules, rows, modules.nodes, modules.updates
        self.anatomy, self.config = modules.anatomy, modules.config
        self.width = self.anatomy.head_width
        self.positions = modules.positions
        self.disentangled = Disentangled(self) if self.positions == "disentangled" else None
        # padded graphs are for runtimes that have no branches either, such as OpenVINO
        packed = isinstance(rows, Packed) and not self.nodes.fused
        self.streams = packed and self.positions not in ("bias", "disentangled")
        self.heavy = either(rows.several, self._long(rows.groups[0]))
        self.scale: float = (self.width * (self.disentangled.terms if self.disentangled else 1)) ** -0.5

    def __call__(self, layer: int, query: Value, key: Value, value: Value) -> Value:
        """query, key, value [T, H] -> [T, H]; H as wide as the layer's heads."""
        if self.positions == "rotary":
            query, key = self._rotated(query, layer), self._rotated(key, layer)
        return self.attended(layer, *(self.spread(layer, x) for x in (query, key, value)))

    def form(self, layer: int) -> tuple[int, int]:
        """Heads and the width of each; in fused graphs 1 and H."""
        heads = self.anatomy.heads_of(layer)
        return (1, heads * self.width) if self.nodes.fused else (heads, self.width)

    def spread(self, layer: int, x: Value) -> Value:
        """[T, H] -> what ``attended`` takes."""
        return self.rows.spread(x, *self.form(layer))

    def attended(self, layer: int, query: Value, key: Value, value: Value) -> Value:
        """query, key, value as ``spread`` makes them, rotated already -> [T, H]."""
        form, rows = self.form(layer), self.rows
        masks = [self._kept(layer, group) for group in rows.groups]

        def of(groups: Sequence[Group], light: bool = False) -> Value:
            q, k, v = (rows.grids(x, *form, groups) for x in (query, key, value))
            found = [self._grid(layer, *one, light) for one in zip(groups, masks, q, k, v, strict=False)]
            return rows.gathered(found, *form)

        found = self.nodes.choose(self.heavy, lambda: of(rows.groups), lambda: of(rows.groups[:1], light=True))
        return self.modules.gated(OUTPUT, layer, lambda: rows.rejoined(found, *form))

    def _long(self, group: Group) -> Condition:
        """Whether a group is worked off in blocks."""
        return self.nodes("Greater", group.columns.squeeze(0), LONG) if self.streams else False

    def _kept(self, layer: int, group: Group) -> Value | None:
        """The mask, where all layers have the same; one of windows is as large as the scores: long groups have none."""
        if self.nodes.fused or self.disentangled:
            return None
        if not self._slides(layer):
            return self._mask(layer, group)
        none = self.nodes.constant(np.zeros((1, 1, 1, 1), self.nodes.dtype.numpy()))
        return self.nodes.choose(self._long(group), lambda: none, lambda: self._mask(layer, group))

    def _grid(self, layer: int, group: Group, mask: Value | None, q: Value, k: Value, v: Value, light: bool) -> Value:
        """q, k, v [heads, B, R, D] -> [heads, B, R, D]; ``light`` where it is known that the group is not long."""
        if self.nodes.fused:
            return self._fused(layer, group, *(x.squeeze(0) for x in (q, k, v))).unsqueeze(0)
        seen = self._mask(layer, group, q, k) if mask is None else mask

        def prefixed() -> Value:
            keys, values = self._prefixed(layer, group, k, v)
            own = seen if light or not self._slides(layer) else self._mask(layer, group)
            return self._product(q, keys, values, self._opened(group, own, keys))

        def plain() -> Value:
            one = partial(self._product, q, k, v, seen)
            return (
                one()
                if light
                else self.nodes.choose(self._long(group), partial(self._blocks, layer, group, q, k, v), one)
            )

        return self.nodes.choose(self.updates.used(PREFIX), prefixed, plain)

    def _blocks(self, layer: int, group: Group, q: Value, k: Value, v: Value) -> Value:
        """The same for one head, one sequence and ``BLOCK`` rows after the other; where windows slide, only the keys
        that a window reaches take part.
        """
        nodes, columns, width = self.nodes, group.columns, self.width
        count = nodes("Div", columns + (BLOCK - 1), BLOCK)
        rows = nodes("Pad", q, joined(0, nodes.value([0]), count * BLOCK - columns), None, [2]).reshape(
            -1, BLOCK, width
        )
        keys, values = (x.reshape(-1, columns, width) for x in (k, v))
        reach = self.config.sliding_window if self._slides(layer) else None

        def attended(number: Value) -> Value:
            whose = nodes("Div", number, count.squeeze(0))
            own = [x.gather(whose) for x in (keys, values)]
            may = group.seen.gather(whose % group.batch.squeeze(0))
            if reach is not None:
                first = (number % count.squeeze(0)) * BLOCK
                ends = nodes("Max", first - reach, 0), nodes("Min", first + (BLOCK + reach), columns.squeeze(0))
                *own, may = (nodes("Slice", x, *(end.unsqueeze(0) for end in ends), [0]) for x in (*own, may))
                row, column = nodes("Range", first, first + BLOCK, 1), nodes("Range", *ends, 1)
                may = may & (nodes("Abs", row.unsqueeze(1) - column.unsqueeze(0)) <= reach)
            mask = may.where(0.0, self._unseen(layer))
            scores = rows.gather(number) * self.scale @ own[0].transpose(1, 0) + mask
            return nodes("Softmax", scores, axis=-1) @ own[1]

        found = nodes.each(counted(nodes, rows.size(0)), attended)
        shape = joined(0, q.size(0), group.batch, nodes.value([-1]), nodes.value([width]))
        return nodes("Slice", nodes("Reshape", found, shape), [0], columns, [2])

    def _prefixed(self, layer: int, group: Group, k: Value, v: Value) -> tuple[Value, Value]:
        """k, v [heads, B, R, width] behind the prefix of their sequence -> [heads, B, V + R, width]."""
        keys, values = (self.updates.prefix(column, layer, group, *self.form(layer)) for column in "kv")
        return joined(2, keys, k), joined(2, values, v)

    def _product(self, q: Value, k: Value, v: Value, mask: Value) -> Value:
        """q [heads, B, R, D]; k, v [heads, B, V + R, D] -> [heads, B, R, D]."""
        return self.nodes("Softmax", q * self.scale @ k.transpose(0, 1, 3, 2) + mask, axis=-1) @ v

    def _fused(self, layer: int, group: Group, q: Value, k: Value, v: Value) -> Value:
        """q, k, v [B, R, H] -> [B, R, H].

        By the number of keys of each sequence where that says all, by the mask where windows or distances matter.
        """
        heads, prefixed = self.anatomy.heads_of(layer), self.updates.used(PREFIX) is True
        keys, values = k, v
        if prefixed:
            keys, values = (x.squeeze(0) for x in self._prefixed(layer, group, k.unsqueeze(0), v.unsqueeze(0)))
        count, bias = None, None
        if self._slides(layer) or self.positions in ("bias", "disentangled"):
            by_head = (x.reshape(group.batch, -1, heads, self.width).transpose(2, 0, 1, 3) for x in (q, k))
            mask = self._mask(layer, group, *by_head)
            mask = self._opened(group, mask, keys.unsqueeze(0)) if prefixed else mask
            bias = self.nodes("Expand", mask, joined(0, group.columns, self.nodes.value([1]))).transpose(1, 0, 2, 3)
        else:
            seen = self.rows.text.count + self.rows.layout.most
            count = self.nodes(
                "Cast", (seen + self.updates.prefix_length(group) if prefixed else seen).squeeze(1), to=INT32
            )
        return self.nodes(
            "MultiHeadAttention", q, keys, values, None, count, bias,
            domain=CONTRIB, num_heads=heads, scale=self.scale,
        )  # fmt: skip

    def _slides(self, layer: int) -> bool:
        """Whether a row sees only those near it."""
        kinds: list[str] | None = getattr(self.config, "layer_types", None)
        return kinds is not None and kinds[layer] == SLIDING

    def _mask(self, layer: int, group: Group, q: Value | None = None, k: Value | None = None) -> Value:
        """[1 or heads, B, 1 or R, R]: what is added to scores; q and k [heads, B, R, D] where it depends on them."""
        may, apart = group.seen.unsqueeze(0, 2), self._apart(group)
        if self._slides(layer):
            may = may & (self.nodes("Abs", apart) <= self.config.sliding_window)
        mask = may.where(0.0, self._unseen(layer))
        if self.disentangled is not None and q is not None and k is not None:
            return mask + self.disentangled(layer, apart, q, k) * self.scale
        return mask + self._relative(apart) if self.positions == "bias" else mask

    def _unseen(self, layer: int) -> float:
        """What is added to a score where a row may not look.

        Where rows are packed, a place of padding is a copy of its sequence's last row: but for what positions add, its
        score is one of those that the row sees. 64 below the highest is 1.6e-28 of the softmax's largest, nothing in a
        float32 sum. The lowest float would give subnormal numbers, which processors are slow with: so it stands only
        where nothing is known of the scores. Not minus infinity: rows of padding that see nothing would be NaN.
        """
        if not isinstance(self.rows, Packed) or self._slides(layer) or self.disentangled:
            return self.nodes.lowest
        biases = self.modules.state[RELATIVE] if self.positions == "bias" else torch.zeros(1)
        return FAR_BELOW - (biases.max() - biases.min()).item()

    def _apart(self, group: Group) -> Value:
        """[R, R]: row i's column less row j's."""
        column = counted(self.nodes, group.columns)
        return column.unsqueeze(1) - column.unsqueeze(0)

    def of_distance(self, table: torch.Tensor, apart: Value) -> Value:
        """[R, R]: entries of ``table`` [2 M - 1], which has the one for a distance d of two of M rows at d + M - 1."""
        return self.nodes.constant(table.numpy()).gather(apart + table.shape[0] // 2)

    @property
    def distances(self) -> torch.Tensor:
        """[2 M - 1]: all distances between two of M rows, the most that a sequence can have."""
        most = self.anatomy.max_tokens + self.rows.layout.most
        return torch.arange(1 - most, most)

    def _relative(self, apart: Value) -> Value:
        """[heads, 1, R, R]: MPNet's bias for the distance between two rows, from a table of all distances."""
        table = self.modules.own(RELATIVE)
        assert table is not None
        biases = table.gather(self.of_distance(mpnet_buckets(-self.distances), apart))
        return biases.transpose(2, 0, 1).unsqueeze(1)

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

    def _opened(self, group: Group, mask: Value, keys: Value) -> Value:
        """The mask [1 or heads, B, R, V + R], with columns for the prefixes in front of the keys [heads, B, V + R, D].

        Every row sees the prefix of its own sequence.
        """
        one, rows = self.nodes.value([1]), group.columns
        seen = counted(self.nodes, keys.size(2) - rows).unsqueeze(0) < self.updates.prefix_length(group)
        shape = joined(0, mask.size(0), group.batch, rows, one)
        opened = self.nodes("Expand", seen.where(0.0, self.nodes.lowest).unsqueeze(0, 2), shape)
        return joined(3, opened, self.nodes("Expand", mask, shape))


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

    def __call__(self, layer: int, apart: Value, q: Value, k: Value) -> Value:
        """q, k [heads, B, R, D], rows ``apart`` -> [heads, B, R, R], not yet scaled; 0 without such scores."""
        found = []
        if "c2p" in self.kinds:
            found.append(self._scores(apart, q, self._projected(KEY, layer), 1))
        if "p2c" in self.kinds:
            found.append(self._scores(apart, k, self._projected(QUERY, layer), -1).transpose(0, 1, 3, 2))
        return self.nodes.total(*found) if found else self.nodes.value(0.0)

    def _projected(self, slot: str, layer: int) -> Value:
        """[heads, 1, D, 2 span]: the embeddings of relative positions, normed where the checkpoint does, projected."""
        name = "encoder.rel_embeddings.weight"  # as many as are read: HuggingFace's model makes no more
        rows = self.nodes.weight(name, self.modules.state[name])
        rows = self.modules.norm("relative_norm", 0, rows) if self.modules.has("relative_norm") else rows
        heads, width = self.attention.anatomy.heads_of(layer), self.attention.width
        projected = self.modules.linear(slot if self.shared else f"position_{slot}", layer, rows)
        return projected.reshape(-1, heads, width).transpose(1, 2, 0).unsqueeze(1)

    def _scores(self, apart: Value, x: Value, positions: Value, sign: int) -> Value:
        """x [heads, B, R, D] with the positions of its distances, times ``sign``, to all rows -> [heads, B, R, R]."""
        scores = x @ positions
        index = self.attention.of_distance((sign * self.apart + self.span).clamp(0, 2 * self.span - 1), apart)
        shape = self.nodes("Shape", x, start=0, end=3)
        return self.nodes("GatherElements", scores, self.nodes("Expand", index, joined(0, shape, x.size(2))), axis=-1)
