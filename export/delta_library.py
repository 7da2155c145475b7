"""The deltas of an export for many: their rows as arrays, which are inputs of its graph, and a card for each.

Further deltas join without a new graph: their rows stand behind those that are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from bertology_serve.deltas.delta import Delta, bare
from bertology_serve.encoder.bank import BARE, DeltaBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import FormatError, SpecError, Unsupported
from bertology_serve.export.emitter import head_nodes
from bertology_serve.export.emitter.delta_inputs import GATED, INDEX, Arrays, Feed
from bertology_serve.export.emitter.emit import EMBEDDING, LOGITS, TOKEN_LOGITS
from bertology_serve.export.emitter.nodes import Array
from bertology_serve.export.export_directory import delta_hash, longest
from bertology_serve.families.family import HeadShape
from bertology_serve.files import JsonObject
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.tasks.heads import Layer
from bertology_serve.tasks.spec import MULTI_VECTOR, POOLED_KINDS, SPARSE

AGAIN = "export with --multi again"
FILE, CARDS = "stacks.safetensors", "deltas"
_NUMBERS = ("ranks", "bias", "units", "rows")
"""Tables that hold numbers of stack rows, which move when the stack stands behind another."""


@dataclass(frozen=True)
class LibraryCard:
    """What a caller must know of a delta: its answer is in the first ``columns`` of ``output``, called ``labels``.

    ``thresholds`` are the least sigmoid of each label that applies, where several may (none: 0.5).
    """

    name: str
    version: str
    task: str
    output: str
    columns: int
    labels: tuple[str, ...]
    max_length: int
    kinds: tuple[str, ...]
    sha256: str
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Library:
    """``arrays`` are all inputs of the graph but the text and ``delta``; ``cards`` [D] the deltas in order."""

    arrays: Arrays
    cards: tuple[LibraryCard, ...]

    def join(self, other: Library) -> Library:
        """Both, the other's deltas behind; SpecError where a name is there already, FormatError for other arrays."""
        twice = {card.name for card in self.cards} & {card.name for card in other.cards}
        if twice:
            raise SpecError(f"delta {min(twice)!r} is there already; leave it out, or train it with another --name")
        _check_alike(self.arrays, other.arrays)
        return Library(_joined(self.arrays, other.arrays), self.cards + other.cards)

    def without_base(self) -> Library:
        """All but number 0, whose rows are zero."""
        arrays = {name: array if array.dtype == np.float32 else array[1:] for name, array in self.arrays.items()}
        return Library(arrays, self.cards[1:])

    def save(self, path: Path) -> None:
        """Writes one safetensors file, the cards as JSON in its metadata; the same bytes every time."""
        cards = json.dumps([asdict(card) for card in self.cards], ensure_ascii=False)
        arrays = {name: np.ascontiguousarray(array) for name, array in sorted(self.arrays.items())}
        save_file(arrays, path, metadata={CARDS: cards})

    @classmethod
    def load(cls, path: Path) -> Library:
        """Reads what ``save`` wrote; FormatError where it is something else."""
        try:
            with safe_open(path, "np") as file:
                cards = json.loads((file.metadata() or {})[CARDS])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            return cls(arrays, tuple(read_card(card) for card in list(cards)))
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as problem:
            raise FormatError(f"{path.name} is no file of stacks ({problem}); {AGAIN}") from None


def library_of(encoder: Encoder, deltas: Iterable[Delta]) -> Library:
    """The bare base as number 0, then the deltas. Raises what ``library_of_one`` raises, SpecError for a name twice."""
    return reduce(Library.join, (library_of_one(encoder, delta) for delta in (base_of(encoder), *deltas)))


def base_of(encoder: Encoder) -> Delta:
    """The bare base as a delta."""
    return bare("base", encoder.ref, encoder.base_task)


def borrows_dense(encoder: Encoder, delta: Delta) -> bool:
    """Whether the dense layer of a delta's head is the base's own (BERT's pooler)."""
    layers = [layer for layer in encoder.head(delta.task).layers if isinstance(layer, Layer)]
    return len(layers) == 2 and f"{layers[0].form.path}.weight" not in delta.head


def head_eps(encoder: Encoder) -> float | None:
    """The epsilon of the norms in this family's heads; ``None`` where heads have none."""
    form = encoder.family.sequence
    layers = form(HeadShape("", 1, 1, encoder.config.to_dict())) if form is not None else ()
    return next((layer.norm_eps for layer in layers if layer.norm is not None), None)


def library_of_one(encoder: Encoder, delta: Delta) -> Library:
    """The rows of one delta. Raises Unsupported for a checkpoint, a task without a head in the graph, and factors that
    it has no place for.
    """
    if delta.weights:
        raise Unsupported(f"delta {delta.name!r} is a whole checkpoint and shares no encoder; export it by itself")
    if delta.task.kind in (SPARSE, MULTI_VECTOR):
        raise Unsupported(
            f"delta {delta.name!r} does {delta.task.kind}, for which a graph for many has no head; export it alone"
        )
    delta = encoder.fitted(delta)
    bank, feed = DeltaBank(encoder.anatomy, encoder.dtype, encoder.device), Feed(encoder.anatomy)
    effects = encoder.allowed(delta.effects(encoder.anatomy))
    entry = bank.add(delta.name, effects) if delta.specs else BARE
    if not feed.takes([entry]):
        stuck = ", ".join(sorted(effects.inner.keys() - {*GATED}))
        raise Unsupported(
            f"delta {delta.name!r} scales the inputs of {stuck}, which the graph has for {' and '.join(GATED)} alone; "
            "export it by itself, with --merge"
        )
    stacks = {name: array[:, : _height(name, entry.rows)].copy() for name, array in feed.stacks(bank).items()}
    tables = {name: array for name, array in feed.tables([entry]).items() if name != INDEX}
    return Library(stacks | tables | _head(encoder, delta), (_card(encoder, delta),))


def _height(stack: str, rows: Mapping[str, RowSegment]) -> int:
    """Rows of a stack that a single delta fills, row 0 included."""
    segment = rows.get(stack.rpartition(".")[0])
    return 1 if segment is None else max(segment.last, segment.bias + 1)


def read_card(card: JsonObject) -> LibraryCard:
    """A card of its fields, as JSON has them."""
    values: JsonObject = {name: tuple(value) if isinstance(value, list) else value for name, value in card.items()}
    return LibraryCard(**values)


def _card(encoder: Encoder, delta: Delta) -> LibraryCard:
    task = delta.task
    return LibraryCard(
        name=delta.name,
        version=delta.version,
        task=task.kind,
        output=EMBEDDING if task.kind in POOLED_KINDS else TOKEN_LOGITS if task.per_token else LOGITS,
        columns=task.outputs or encoder.anatomy.hidden,
        labels=task.labels,
        max_length=longest(encoder, delta),
        kinds=delta.kinds,
        sha256=delta_hash(delta),
        thresholds=task.thresholds,
    )


def _head(encoder: Encoder, delta: Delta) -> Arrays:
    """The stacks and the form of one head; row 0 of each stack is zero."""
    head, task, hidden = encoder.head(delta.task), delta.task, encoder.anatomy.hidden
    head.load(delta.head)
    layers = [layer for layer in head.layers if isinstance(layer, Layer)]
    out, dense = layers[-1] if layers else None, layers[0] if len(layers) == 2 else None
    if dense is not None and dense.linear.out_features != hidden:
        raise Unsupported(
            f"delta {delta.name!r}: its head has a hidden layer of {dense.linear.out_features}, and the graph for many "
            f"has room for {hidden}; export it by itself (--merge)"
        )
    kind = head_nodes.HEAD_ACTIVATIONS.index(dense.form.activation) if dense else 0
    pooling = head_nodes.POOLINGS.index(task.pooling)
    form = [int(dense is not None), int(out is not None), kind, pooling, int(task.per_token), 0]
    form[head_nodes.UNIT] = int(task.kind in POOLED_KINDS and task.normalize)
    found: Arrays = {head_nodes.FORM: np.array([form], np.int64)}
    found |= _layer("dense", dense, hidden, hidden) | _layer("out", out, hidden, max(task.outputs, 1))
    if head_eps(encoder) is not None:
        norm = dense.norm if dense else None
        weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
        found |= {"head.norm": _below(weight, (hidden,), dense), "head.norm_bias": _below(bias, (hidden,), dense)}
    return found


def _layer(name: str, layer: Layer | None, inputs: int, outputs: int) -> Arrays:
    weight = None if layer is None else layer.linear.weight.T
    bias = None if layer is None else layer.linear.bias
    found: Arrays = {f"head.{name}": _below(weight, (inputs, outputs), layer)}
    return found | {f"head.{name}_bias": _below(bias, (outputs,), layer)}


def _below(tensor: Tensor | None, shape: tuple[int, ...], layer: Layer | None) -> NDArray[np.float32]:
    """A tensor (zeros where the layer lacks it) below a row of zeros; that row alone without a layer."""
    rows = [np.zeros(shape, np.float32)]
    if layer is not None:
        rows.append(rows[0] if tensor is None else tensor.detach().float().numpy())
    return np.stack(rows)


def _check_alike(one: Arrays, other: Arrays) -> None:
    """Raises FormatError unless both have the same arrays, alike in all but the axes that grow."""
    for name in sorted(one.keys() ^ other.keys()):
        raise FormatError(f"the stacks {'have no' if name in other else 'have a strange'} {name}; {AGAIN}")
    for name, array in one.items():
        fixed = [
            axis for axis in range(array.ndim) if axis not in ((1,) if is_stack(name, array) else (0, array.ndim - 1))
        ]
        theirs = other[name]
        same = array.dtype == theirs.dtype and array.ndim == theirs.ndim
        if not same or any(array.shape[axis] != theirs.shape[axis] for axis in fixed):
            found, expected = (f"{part.dtype} {list(part.shape)}" for part in (array, theirs))
            raise FormatError(f"the stack {name} is {found}, where the encoder has {expected}; {AGAIN}")


def _joined(one: Arrays, other: Arrays) -> Arrays:
    heights = {name: array.shape[int(is_stack(name, array))] for name, array in one.items()}
    found: Arrays = {}
    for name in one:
        first, second = one[name], other[name]
        place, _, column = name.rpartition(".")
        if is_stack(name, first):
            found[name] = np.concatenate([first, second[:, 1:]], 1)
        elif first.dtype == np.float32:
            found[name] = np.concatenate(_as_wide(first, second[1:]), 0)
        else:
            moved = _moved(second.astype(np.int64), place, column, one, heights)
            found[name] = np.concatenate(_as_wide(first, moved), 0)
    return found


def is_stack(name: str, array: Array) -> bool:
    """Whether an array is a pool [L, P, width]; heads have their rows first, tables their deltas."""
    return bool(array.dtype == np.float32) and not name.startswith("head.")


def _moved(
    table: NDArray[np.int64], place: str, column: str, one: Arrays, heights: dict[str, int]
) -> NDArray[np.int64]:
    """Another library's table, its numbers counted from where its rows now stand."""
    if column in _NUMBERS:
        height = next(heights[name] for name in one if name.rpartition(".")[0] == place and is_stack(name, one[name]))
        return np.where(table > 0, table + height - 1, 0)
    if place == "head":
        by = np.zeros(table.shape[1], np.int64)
        by[head_nodes.DENSE], by[head_nodes.OUT] = heights["head.dense"] - 1, heights["head.out"] - 1
        by[head_nodes.ACTIVATION :] = 0
        return np.where((table > 0) & (by > 0), table + by, table)
    return table


def _as_wide(first: Array, second: Array) -> tuple[Array, Array]:
    """Two arrays, the last axis of the narrower one filled up with zeros."""
    width = max(first.shape[-1], second.shape[-1])

    def filled(array: Array) -> Array:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])

    return filled(first), filled(second)
