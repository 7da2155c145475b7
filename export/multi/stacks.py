"""What the graph takes beside the text: the rows of all deltas in stacks, and tables that say whose they are.

Stacks are the pools of ``encoder.bank``: ``[L, P, width]``, one row a rank, bias, unit or vector, the same row numbers
in every layer, row 0 zero. Tables have a row for each delta of a batch (D of them) and hold numbers of stack rows,
filled up with 0; tables of no columns say that no delta of the batch has anything at a place, and nothing is computed there.

| place | stacks | tables |
|---|---|---|
| a linear, ``query`` | ``query.a`` [L, P, K], ``query.b`` [L, P, N] | ``query.ranks`` [D, R], ``query.bias`` [D, 1] |
| a norm, ``ffn_norm`` | ``ffn_norm.b`` [L, P, H] | ``ffn_norm.bias`` [D, 1] |
| factors of outputs, ``value.scale``, or of a norm's | ``value.scale.g`` [L, P, N], less 1 | ``value.scale.bias`` [D, 1] |
| factors of inputs, ``down.inner`` | ``down.inner.g`` [L, P, K], less 1 | ``down.inner.bias`` [D, 1] |
| an adapter, ``output.adapter`` | ``.down``, ``.up`` [L, P, H], ``.down_bias`` [L, P, 1] | ``.units`` [D, M], ``.bias`` and ``.activation`` [D, 1], a place in ``ACTIVATIONS`` |
| ``prompt`` | ``prompt.v`` [1, P, E] | ``prompt.rows`` [D, V], ``prompt.form`` [D, 4]: length, lead, shifted, first |
| ``prefix`` | ``prefix.k``, ``prefix.v`` [L, P, H] | ``prefix.rows`` [D, V], ``prefix.form`` [D, 2]: length, shifted |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bertology_serve.deltas.slots import DOWN, FFN_NORM, OUTPUT, Anatomy
from bertology_serve.encoder.bank import PREFIX, PROMPT, adapter, inner, scale

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
INDEX = "delta"
"""The input [batch] that names each sequence's delta, by its row in the tables."""
GATED = (OUTPUT, DOWN)
"""Slots whose inputs have factors in the graph. What the others read, others read too."""
LENGTH, LEAD, SHIFTED, FIRST = range(4)
"""Columns of ``prompt.form``: vectors, rows of text before them, whether they shift positions, the row a head reads."""
PREFIX_SHIFTED = 1
"""The second column of ``prefix.form``; the first is the length."""


@dataclass(frozen=True)
class Stack:
    """One place: ``columns`` are its stacks' names and widths, ``tables`` its tables' names, each int64.

    ``fixed`` are the widths of tables that are always as wide. Where layers differ, as in a pruned encoder, columns are
    as wide as the widest, and ``layers`` holds the width of each.
    """

    name: str
    depth: int
    columns: dict[str, int]
    tables: tuple[str, ...]
    fixed: dict[str, int] = field(default_factory=dict)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def width(self, column: str, layer: int) -> int:
        """Of a stack in one layer."""
        return self.layers[column][layer] if column in self.layers else self.columns[column]

    def input(self, column: str) -> str:
        """The name that a stack or table has as an input."""
        return f"{self.name}.{column}"


def stacks(anatomy: Anatomy) -> dict[str, Stack]:
    """Every place of an encoder that deltas can change, by its pool's name."""
    return {stack.name: stack for stack in _stacks(anatomy)}


def adapter_places(anatomy: Anatomy) -> tuple[str, ...]:
    """The slots that bottleneck adapters stand behind: Houlsby's two, and Pfeiffer's where norms come last."""
    return (OUTPUT, DOWN) if anatomy.pre_norm else (OUTPUT, DOWN, FFN_NORM)


def _stacks(anatomy: Anatomy) -> Iterator[Stack]:
    hidden, depth = anatomy.hidden, anatomy.layers
    for slot in anatomy.slots.values():
        if slot.inputs:
            columns = {"a": slot.inputs, "b": slot.outputs}
            layers = {
                "a": tuple(slot.inputs_of(layer) for layer in range(slot.depth)),
                "b": tuple(slot.outputs_of(layer) for layer in range(slot.depth)),
            }
            yield Stack(slot.name, slot.depth, columns, ("ranks", "bias"), layers=layers)
            if slot.name in GATED:
                yield Stack(inner(slot.name), slot.depth, {"g": slot.inputs}, ("bias",), layers={"g": layers["a"]})
            yield Stack(scale(slot.name), slot.depth, {"g": slot.outputs}, ("bias",), layers={"g": layers["b"]})
        else:
            yield Stack(slot.name, slot.depth, {"b": slot.outputs}, ("bias",))
            yield Stack(scale(slot.name), slot.depth, {"g": slot.outputs}, ("bias",))
    for place in adapter_places(anatomy):
        columns = {"down": hidden, "down_bias": 1, "up": hidden}
        yield Stack(adapter(place), depth, columns, ("units", "bias", "activation"))
    yield Stack(PROMPT, 1, {"v": anatomy.embedding_width}, ("rows", "form"), {"form": 4})
    kept = tuple(anatomy.heads_of(layer) * anatomy.head_width for layer in range(depth))
    widest = {"k": max(kept), "v": max(kept)}
    yield Stack(PREFIX, depth, widest, ("rows", "form"), {"form": 2}, {"k": kept, "v": kept})
