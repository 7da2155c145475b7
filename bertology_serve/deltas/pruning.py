"""What an encoder was pruned from, and how its parent's deltas are sliced to what is left of it.

A head is D rows of query, key and value and the D columns of output that read it; an FFN neuron is a row of up (and
gate) and a column of down. All that a delta does to these goes with them, so a sliced delta on the pruned encoder
answers as the whole one does on the parent with those heads and neurons masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from bertology_serve.deltas.delta import BaseRef, Delta, EncoderShape
from bertology_serve.deltas.format import anatomy_of, anatomy_record
from bertology_serve.deltas.safe_io import as_object, build, check_keys, conform
from bertology_serve.errors import FormatError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kinds import kinds
from bertology_serve.kinds.slots import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, Anatomy, Slot

FORMAT = 1
PRUNED = "bertology_pruned"  # the field of config.json that tells a pruned encoder from a whole one
Numbers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Pruning:
    """``parent`` and its ``anatomy``; ``heads`` and ``neurons`` that stayed, by their numbers there, a layer each.

    ``before`` is how the parent itself was pruned, if it was.
    """

    parent: BaseRef
    anatomy: Anatomy
    heads: Numbers
    neurons: Numbers
    before: Pruning | None = None

    def inputs_kept(self, slot: str, layer: int) -> Tensor | None:
        """Numbers of the columns that a slot's inputs keep; ``None`` for all of them."""
        return self._kept(layer, slot == OUTPUT, slot == DOWN)

    def outputs_kept(self, slot: str, layer: int) -> Tensor | None:
        """The same of its outputs."""
        return self._kept(layer, slot in (QUERY, KEY, VALUE), slot in (UP, GATE))

    def _kept(self, layer: int, by_head: bool, by_neuron: bool) -> Tensor | None:
        if by_head:
            width = self.anatomy.head_width
            return (torch.tensor(self.heads[layer])[:, None] * width + torch.arange(width)).flatten()
        return torch.tensor(self.neurons[layer]) if by_neuron else None

    def as_dict(self) -> JsonObject:
        """Ready for JSON; ``restore`` gives it back."""
        return {
            "format": FORMAT,
            "parent": asdict(self.parent),
            "heads": self.heads,
            "neurons": self.neurons,
            "anatomy": anatomy_record(self.anatomy),
            "before": None if self.before is None else self.before.as_dict(),
        }


def pruning_of(values: object, where: str) -> Pruning:
    """The record of a pruned encoder; raises FormatError for anything that cannot be one."""
    table = as_object(values, where)
    known = dict.fromkeys(("format", "parent", "heads", "neurons", "anatomy", "before"))
    check_keys(table, known, where)
    lacking = sorted(known.keys() - table.keys())
    if lacking or table["format"] != FORMAT:
        wrong = f"lacks {lacking[0]!r}" if lacking else f"has format {str(table['format'])[:40]}; expected {FORMAT}"
        raise FormatError(f"{where} {wrong}; prune the encoder again")
    parent = build(BaseRef, table["parent"], f"{where}.parent")
    anatomy = anatomy_of(table["anatomy"], parent.family, f"{where}.anatomy")
    heads, neurons = (conform(table[name], Numbers, f"{where}.{name}") for name in ("heads", "neurons"))
    before = None if table["before"] is None else pruning_of(table["before"], f"{where}.before")
    pruning = Pruning(parent, anatomy, heads, neurons, before)
    check_kept(pruning, where)
    return pruning


def check_kept(pruning: Pruning, where: str) -> None:
    """Raises FormatError unless in every layer some of the parent's heads and neurons stay, their numbers rising."""
    anatomy = pruning.anatomy
    for name, layers, size in (
        ("heads", pruning.heads, anatomy.heads_of),
        ("neurons", pruning.neurons, anatomy.slot(UP).outputs_of),
    ):
        if len(layers) != anatomy.layers:
            raise FormatError(f"{where}: {name} of {len(layers)} layers; the parent has {anatomy.layers}")
        for layer, kept in enumerate(layers):
            if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size(layer):
                raise FormatError(
                    f"{where}: the {name} of layer {layer} must rise, be at least one, and lie in 0..{size(layer) - 1}"
                )


@dataclass(frozen=True)
class Left:
    """The columns that a pruning leaves, in stacks as wide as the pruned ``anatomy``'s (see ``kind.Cut``)."""

    pruning: Pruning
    anatomy: Anatomy

    def inputs(self, stack: Tensor, slot: Slot, layers: Sequence[int]) -> Tensor:
        """``stack`` [n, ..., K of the parent] -> [n, ..., K]."""
        return _gathered(stack, slot.name, layers, self.pruning.inputs_kept, self.anatomy.slot(slot.name).inputs)

    def outputs(self, stack: Tensor, slot: Slot, layers: Sequence[int]) -> Tensor:
        """``stack`` [n, ..., N of the parent] -> [n, ..., N]."""
        return _gathered(stack, slot.name, layers, self.pruning.outputs_kept, self.anatomy.slot(slot.name).outputs)


def _gathered(
    stack: Tensor, slot: str, layers: Sequence[int], kept: Callable[[str, int], Tensor | None], width: int
) -> Tensor:
    found = stack.new_zeros(*stack.shape[:-1], width)
    for index, layer in enumerate(layers):
        columns = kept(slot, layer)
        if columns is None:
            return stack
        found[index, ..., : len(columns)] = stack[index].index_select(-1, columns.to(stack.device))
    return found


def sliced_state(state: Mapping[str, Tensor], pruning: Pruning) -> dict[str, Tensor]:
    """An encoder's weights without the heads and neurons that went, by the same names; copies where anything did."""
    found = dict(state)
    for slot in pruning.anatomy.slots.values():
        for layer in slot.present:
            weight, bias = f"{slot.paths[layer]}.weight", f"{slot.paths[layer]}.bias"
            rows, columns = pruning.outputs_kept(slot.name, layer), pruning.inputs_kept(slot.name, layer)
            if rows is not None:
                found[weight] = found[weight][rows]
                if bias in found:
                    found[bias] = found[bias][rows]
            if columns is not None:
                found[weight] = found[weight][:, columns]
    return found


def fitted(delta: Delta, anatomy: Anatomy, ref: BaseRef, pruning: Pruning | None) -> Delta:
    """The delta as an encoder takes it: sliced where it was made for what the encoder was pruned from, else itself.

    Whole checkpoints keep their name and become those of the pruned encoder. Raises Unsupported for kinds that cannot
    be sliced.
    """
    if pruning is None or delta.base.sha256 == ref.sha256:
        return delta
    delta = fitted(delta, pruning.anatomy, pruning.parent, pruning.before)
    return _sliced(delta, pruning, anatomy, ref) if delta.base.sha256 == pruning.parent.sha256 else delta


def _sliced(delta: Delta, pruning: Pruning, anatomy: Anatomy, ref: BaseRef) -> Delta:
    tensors: dict[str, Tensor] = {}
    left = Left(pruning, anatomy)
    for spec in delta.specs:
        kind = kinds.kind_of(spec)
        if kind.cut is None:
            raise Unsupported(
                f"delta {delta.name!r} was made for {pruning.parent.name}, and a {kind.name} cannot be sliced to the "
                f"pruned {ref.name}; train it again on that"
            )
        start = f"{kind.name}."
        own = {name.removeprefix(start): rows for name, rows in delta.tensors.items() if name.startswith(start)}
        tensors |= {start + name: rows for name, rows in kind.cut(spec, own, pruning.anatomy, left).items()}
    weights = sliced_state(delta.weights, pruning) if delta.weights else {}
    return replace(delta, base=ref, tensors=tensors, weights=weights, made_for=EncoderShape(anatomy, peft=False))
