"""Slots: the places of an encoder that a delta can change. Found by ``encoder.anatomy``; used by every floor above."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bertology_serve.errors import SpecError, nearest

QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"
UP, GATE, DOWN = "up", "gate", "down"
QKV, UP_GATE = "qkv", "up_gate"
LINEAR_SLOTS = (QUERY, KEY, VALUE, OUTPUT, UP, GATE, DOWN, QKV, UP_GATE)
BEHIND_NORMS = ((QUERY, KEY, VALUE, QKV), (UP, GATE, UP_GATE))
"""Linear slots that read the rows of a LayerNorm, those of the same rows together."""
ATTENTION_NORM, FFN_NORM, EMBEDDING_NORM, FINAL_NORM = "attention_norm", "ffn_norm", "embedding_norm", "final_norm"
OUTSIDE = (EMBEDDING_NORM, "embedding_projection", FINAL_NORM, "relative_norm", "conv", "conv_norm")
"""Slots that stand outside the layers."""

# The names people know from the checkpoints and papers, all of them accepted on the command line.
ALIASES = {
    "q": QUERY, "k": KEY, "v": VALUE, "o": OUTPUT,
    "q_lin": QUERY, "k_lin": KEY, "v_lin": VALUE, "out_lin": OUTPUT,
    "query_proj": QUERY, "key_proj": KEY, "value_proj": VALUE,
    "attention_output": OUTPUT, "intermediate": UP, "ffn_up": UP, "ffn_down": DOWN,
    "lin1": UP, "lin2": DOWN, "Wqkv": QKV, "Wi": UP_GATE,
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """One place of the anatomy, the same in every layer.

    ``paths`` are dotted module names in the headless HuggingFace model, one a layer (``None`` where a layer lacks
    the module, as ModernBERT's first attention norm); slots outside the layers have a single path. ``part`` is the
    half-open column range ``(lo, hi)`` of the module's output that this slot names, for slices of packed
    projections, else ``None``. ``inputs`` is K (0 for norms, which have a bias only), ``outputs`` is N. Where layers
    differ, as in a pruned encoder, ``sizes`` holds (K, N) of each layer and ``inputs`` and ``outputs`` are the
    largest: stacks are as wide as those, with zeros behind a narrower layer's columns.
    """

    name: str
    paths: tuple[str | None, ...]
    inputs: int
    outputs: int
    has_bias: bool
    part: tuple[int, int] | None = None
    sizes: tuple[tuple[int, int], ...] = ()

    def inputs_of(self, layer: int) -> int:
        """K in one layer."""
        return self.sizes[layer][0] if self.sizes else self.inputs

    def outputs_of(self, layer: int) -> int:
        """N in one layer."""
        return self.sizes[layer][1] if self.sizes else self.outputs

    @property
    def depth(self) -> int:
        """Number of layers in this slot's stacks (1 for slots outside the layers)."""
        return len(self.paths)

    @property
    def present(self) -> tuple[int, ...]:
        return tuple(i for i, path in enumerate(self.paths) if path is not None)


@dataclass(frozen=True)
class Anatomy:
    """What an encoder is made of.

    ``family`` is the HuggingFace ``model_type``; ``prefix`` the name of the encoder inside HuggingFace's task models
    (``bert``, ``roberta``, ``model``...), which peft's tensor names begin with. ``position_offset`` is the position
    of the first token (2 for RoBERTa). ``max_tokens`` is the longest sequence. ``pre_norm`` says whether LayerNorms
    stand before their blocks (ModernBERT). ``heads`` is the number before any pruning, as ``hidden`` and D are.
    """

    family: str
    prefix: str
    layers: int
    hidden: int
    heads: int
    embedding_width: int
    max_tokens: int
    position_offset: int
    pre_norm: bool
    slots: dict[str, Slot] = field(default_factory=dict)

    @property
    def head_width(self) -> int:
        """D: the width of one attention head."""
        return self.hidden // self.heads

    def heads_of(self, layer: int) -> int:
        """The attention heads of one layer: fewer than ``heads`` in a pruned encoder."""
        return self.slots[QUERY].outputs_of(layer) // self.head_width

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Dotted paths of the layers, lowest first (``encoder.layer.0``, ...)."""
        paths = [(path or "").split(".") for path in self.slot(QUERY).paths]
        last, stem = paths[-1], str(len(paths) - 1)
        at = next(i for i, part in enumerate(last) if part == stem and all(p[:i] == last[:i] for p in paths))
        return tuple(".".join(path[: at + 1]) for path in paths)

    def slot(self, name: str) -> Slot:
        """The slot of that name or alias; raises SpecError naming the nearest known one."""
        found = self.slots.get(ALIASES.get(name, name))
        if found is None:
            raise SpecError(f"{self.family} has no slot {name!r}; {nearest(name, self.slots)}")
        return found

    def resolve(self, names: Iterable[str]) -> tuple[str, ...]:
        """Canonical names of linear slots, each once, in the order given."""
        resolved = dict.fromkeys(self.slot(name).name for name in names)
        wrong = [name for name in resolved if name not in LINEAR_SLOTS]
        if wrong:
            raise SpecError(f"{', '.join(wrong)} is no linear projection; {nearest(wrong[0], self.linear_slots)}")
        return tuple(resolved)

    @property
    def linear_slots(self) -> tuple[str, ...]:
        return tuple(name for name in self.slots if name in LINEAR_SLOTS)
