"""What a delta does to an encoder, in the few terms that every engine, the folder and the exporter understand.

Each kind (LoRA, BitFit, ...) turns its spec and tensors into ``Effects``; nothing below this file knows the kinds.
All stacks have the slot's layers first. Shapes: L layers, R rank, K in, N out, H hidden, M bottleneck width,
V virtual tokens, E embedding width. The tensors may require gradients: effects are differentiable in the delta's
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bertology_serve.kinds.slots import Slot

Layers = tuple[int, ...] | None


@dataclass(frozen=True)
class LowRank:
    """``y += dropout(x) Aᵀ B`` on a linear slot. ``a`` [L, R, K]; ``b`` [L, R, N], the scale already in it.

    ``layers`` are those that have an update (``None``: all); the stacks hold zeros elsewhere.
    """

    a: Tensor
    b: Tensor
    dropout: float = 0.0
    layers: Layers = None

    def at(self, slot: Slot, layer: int) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [R, N] of one layer, as wide as the slot is there."""
        return self.a[layer, :, : slot.inputs_of(layer)], self.b[layer, :, : slot.outputs_of(layer)]


@dataclass(frozen=True)
class Bottleneck:
    """``h += act(n(h) Dᵀ + b_d) U + b_u`` on the output of a slot.

    ``down`` [L, M, H], ``down_bias`` [L, M], ``up`` [L, M, H], ``up_bias`` [L, H]. On a linear slot ``n`` is the
    identity (Houlsby et al. 2019). On a LayerNorm slot (Pfeiffer et al. 2020) the norm is used twice, around the
    adapter: ``LN(act(LN(s) Dᵀ + b_d) U + b_u + s)``. ``layers`` are those that have an adapter; the stacks hold
    zeros elsewhere, and a LayerNorm slot is left as it was there.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class PromptEffect:
    """``vectors`` [V, E] stand in the sequence as rows of their own, before the embedding LayerNorm.

    ``placement``: ``after_cls`` or ``before_cls``. ``positions``: ``kept`` (text rows keep their positions, prompt
    rows take that of [CLS]) or ``shifted`` (rows are numbered as they stand, as peft does). ``head_reads``: ``cls``
    or ``first_row`` (peft reads virtual token 0).
    """

    vectors: Tensor
    placement: str = "after_cls"
    positions: str = "kept"
    head_reads: str = "cls"


@dataclass(frozen=True)
class PrefixEffect:
    """``keys`` and ``values`` [L, V, H] that every row of the sequence attends to, after any rotation.

    ``positions``: ``kept``, or ``shifted`` by V as peft does.
    """

    keys: Tensor
    values: Tensor
    positions: str = "kept"


@dataclass
class Effects:
    """All that a delta does to the encoder: per slot name low-rank updates, bias differences [L, N] and adapters.

    ``scale`` [L, N] multiplies the base's own output of a linear slot by ``1 + scale``; on a LayerNorm slot it is added
    to the norm's weight. ``inner`` [L, K] multiplies the input of a linear slot by ``1 + inner``. ``layers`` are those
    in which biases and factors stand (``None``: all, and outside of them); the stacks hold zeros elsewhere.
    """

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    bottleneck: dict[str, Bottleneck] = field(default_factory=dict)
    prompt: PromptEffect | None = None
    prefix: PrefixEffect | None = None
    scale: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    layers: Layers = None

    @property
    def unfoldable(self) -> tuple[str, ...]:
        """Names of what cannot be folded into the weights."""
        found = {"bottleneck adapter": self.bottleneck, "soft prompt": self.prompt, "prefix": self.prefix}
        return tuple(name for name, part in found.items() if part)

    def lowest(self, depth: int) -> int:
        """The lowest of ``depth`` layers whose output is changed; ``depth`` where none is."""
        slots = self.low_rank.keys() | self.bias.keys() | self.scale.keys() | self.inner.keys()
        spans = [self.changed(slot) for slot in slots] + [unit.layers for unit in self.bottleneck.values()]
        layers = None if self.prompt or self.prefix else _union(spans)
        return 0 if layers is None else min(layers, default=depth)

    def changed(self, slot: str) -> Layers:
        """The layers in which low ranks, biases or factors stand at a slot (``None``: all)."""
        own = any(slot in stacks for stacks in (self.bias, self.scale, self.inner))
        low = [self.low_rank[slot].layers] if slot in self.low_rank else []
        return _union([*low, *([self.layers] if own else [])])


def merged(parts: Iterable[Effects]) -> Effects:
    """The effects of several kinds in one delta. Low ranks on one slot are concatenated, biases added."""
    total, spans = Effects(), []
    for part in parts:
        for slot, update in part.low_rank.items():
            if slot in total.low_rank:
                first = total.low_rank[slot]
                update = LowRank(
                    torch.cat([first.a, update.a], 1),
                    torch.cat([first.b, update.b], 1),
                    max(first.dropout, update.dropout),
                    _union([first.layers, update.layers]),
                )
            total.low_rank[slot] = update
        for slot, shift in part.bias.items():
            total.bias[slot] = total.bias[slot] + shift if slot in total.bias else shift
        for own, more in ((total.scale, part.scale), (total.inner, part.inner)):
            own |= {slot: own[slot] + factor if slot in own else factor for slot, factor in more.items()}
        spans += [part.layers] if part.bias or part.scale or part.inner else []
        total.bottleneck |= part.bottleneck
        total.prompt = part.prompt or total.prompt
        total.prefix = part.prefix or total.prefix
    total.layers = _union(spans)
    return total


def _union(spans: Sequence[Layers]) -> Layers:
    """All layers of some spans, of which ``None`` is every layer."""
    return None if None in spans else tuple(sorted({layer for span in spans for layer in span or ()}))


def spread(stack: Tensor, layers: tuple[int, ...], depth: int) -> Tensor:
    """A stack [len(layers), ...] of chosen layers as a stack [depth, ...] with zeros elsewhere; differentiable."""
    if layers == tuple(range(depth)):
        return stack
    full = stack.new_zeros(depth, *stack.shape[1:])
    return full.index_copy(0, torch.tensor(layers, device=stack.device), stack)
