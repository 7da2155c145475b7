"""The methods of training, their learning rates, and their options as the command line names them. Imports no torch."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from bertology_serve.config_fields import check_fits, named_fields
from bertology_serve.errors import SpecError, nearest

if TYPE_CHECKING:
    from bertology_serve.files import JsonObject

Values = Mapping[str, Any]
"""Fields of a spec or a configuration by their names, as a file or a caller gives them."""

KINDS: Mapping[str, float] = {
    "lora": 1e-3,
    "bitfit": 4e-3,
    "adapter": 2e-3,
    "prompt": 5e-2,
    "prefix": 3e-2,
    "ia3": 1e-2,
    "norms": 4e-3,
    "vera": 3e-2,
}
"""The kinds that are trained, and the highest learning rate of each.

Tried on MiniLM with batches of 32 and a few hundred steps (docs/results/training.md). The head starts at random beside
a delta that starts at nothing, so it takes larger steps: with 77 labels, LoRA's own rate leaves it far behind.
"""
PROBE, FULL = "probe", "full"
MIXOUT, CHILD_TUNING, TOP_K = "mixout", "child-tuning", "top-k"
AUTO = "auto"
METHODS = (*KINDS, PROBE, FULL, MIXOUT, CHILD_TUNING, TOP_K, AUTO)
LEARNING_RATES = {**KINDS, PROBE: 1e-2, **dict.fromkeys((FULL, MIXOUT, CHILD_TUNING, TOP_K), 1e-4)}


def _flag(kind: str, spec_field: str, text: str) -> Any:
    return field(default=None, metadata={"kind": kind, "field": spec_field, "help": f"{kind}: {text}"})


@dataclass(frozen=True)
class KindFlags:
    """One field for each option of each method; ``None`` leaves the method's default."""

    rank: int | None = _flag("lora", "rank", "rank of the update.")
    targets: tuple[str, ...] | None = _flag("lora", "targets", "linears to change, with commas (query,key,value,...).")
    alpha: float | None = _flag("lora", "alpha", "the update is scaled by alpha / rank.")
    dropout: float | None = _flag("lora", "dropout", "share of the update's inputs dropped in training.")
    rslora: bool | None = _flag("lora", "rslora", "scale by alpha / sqrt(rank) instead.")
    lora_init: str | None = _flag("lora", "init", "how A is drawn: kaiming or gaussian.")
    biases: str | None = _flag("bitfit", "biases", "all, or attention (query, key and value).")
    adapter_preset: str | None = _flag("adapter", "preset", "houlsby or pfeiffer.")
    adapter_width: int | None = _flag("adapter", "width", "width of the bottleneck.")
    adapter_after: str | None = _flag("adapter", "after", "houlsby stands after attention, ffn, or both.")
    adapter_activation: str | None = _flag("adapter", "activation", "relu, gelu, silu or tanh.")
    adapter_drop_lowest: int | None = _flag("adapter", "drop_lowest", "lowest layers without an adapter (AdapterDrop).")
    prompt_length: int | None = _flag("prompt", "length", "number of vectors.")
    prompt_placement: str | None = _flag("prompt", "placement", "after_cls or before_cls.")
    prompt_positions: str | None = _flag("prompt", "positions", "kept, or shifted as peft has it.")
    prompt_head_reads: str | None = _flag("prompt", "head_reads", "cls, or first_row as peft has it.")
    prefix_length: int | None = _flag("prefix", "length", "keys and values a layer.")
    prefix_positions: str | None = _flag("prefix", "positions", "kept, or shifted as peft has it.")
    ia3_targets: tuple[str, ...] | None = _flag("ia3", "targets", "linears whose outputs are scaled, with commas.")
    ia3_feedforward: tuple[str, ...] | None = _flag("ia3", "feedforward", "linears whose inputs are, with commas.")
    norm_biases: bool | None = _flag("norms", "biases", "tune the LayerNorms' biases too (the default).")
    vera_rank: int | None = _flag("vera", "rank", "rank of the frozen pair that all linears share.")
    vera_targets: tuple[str, ...] | None = _flag("vera", "targets", "linears to change, with commas.")
    vera_d_initial: float | None = _flag("vera", "d_initial", "where the vector between the pair begins.")
    vera_dropout: float | None = _flag("vera", "dropout", "share of the update's inputs dropped in training.")
    vera_key: int | None = _flag("vera", "key", "seed of the pair (peft's projection_prng_key).")
    vera_save_projection: bool | None = _flag("vera", "save_projection", "keep the pair in the delta (the default).")
    vera_layers: tuple[int, ...] | None = _flag("vera", "layers", "layers to change (as --layers, for this kind).")

    mixout_p: float | None = _flag("mixout", "p", "share of the weights put back for a step. Default: 0.7.")
    child_mode: str | None = _flag("child-tuning", "mode", "d (chosen once, by Fisher information) or f (drawn anew).")
    child_share: float | None = _flag("child-tuning", "share", "share of the weights that is trained. Default: 0.3.")
    top_k: int | None = _flag("top-k", "layers", "upper layers to train. Default: 3.")

    def by_kind(self) -> "dict[str, JsonObject]":
        """What was given, as ``TrainConfig.options`` takes it."""
        given: dict[str, JsonObject] = {}
        for flag in fields(self):
            value = getattr(self, flag.name)
            if value is not None:
                given.setdefault(flag.metadata["kind"], {})[flag.metadata["field"]] = value
        return given


EVERYWHERE: Mapping[str, str] = {
    "prompt": "its vectors enter the first layer with the text",
    "prefix": "it stands in every layer",
}
"""The kinds that have no layers to choose, and why."""
_RANGE, _TOP = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?"), re.compile(r"top:([1-9]\d{0,2})(?:/([1-9]\d{0,2}))?")


def read_layers(given: Iterable[str], depth: int = 1000) -> tuple[int, ...]:
    """The layers of ``depth`` that are meant: ``("0", "3-5")``, ``("top:2",)``, or ``("top:1/3",)`` for a third.

    Raises SpecError for another form, and for layers that are not there.
    """
    found = set[int]()
    for part in given:
        own = range(0)
        if (match := _TOP.fullmatch(part)) and int(match[1]) <= int(match[2] or match[1]):
            count = max(1, round(depth * int(match[1]) / int(match[2]))) if match[2] else int(match[1])
            own = range(depth - count, depth)
        elif match := _RANGE.fullmatch(part):
            own = range(int(match[1]), int(match[2] or match[1]) + 1)
        if not own:
            raise SpecError(
                f"layers is {part!r}; expected numbers from 0 and ranges with commas, such as 0,3-5, or the upper "
                "ones: top:2, or top:1/3 for a third of them"
            )
        if own.start < 0 or own.stop > depth:
            raise SpecError(f"layers is {part!r}; the encoder has {depth} layers, 0 to {depth - 1}")
        found |= {*own}
    return tuple(sorted(found))


MODES = ("d", "f")


@named_fields
@dataclass(frozen=True)
class Probe:
    """The task's head alone, on the encoder as it is (a linear probe)."""


@named_fields
@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every weight of the encoder, and the head."""


@named_fields
@dataclass(frozen=True)
class Mixout:
    """Mixout (Lee et al. 2019, arXiv 1909.11299): ``p`` is the share of a linear's weights put back for a step.
    Raises SpecError for another share.
    """

    p: float = 0.7

    def __post_init__(self) -> None:
        _check_share("p", self.p, 0 <= self.p < 1 if _is_number(self.p) else False, "from 0 up to, not including, 1")


@named_fields
@dataclass(frozen=True)
class ChildTuning:
    """Child-Tuning (Xu et al. 2021, arXiv 2109.05687): ``share`` of the weights has a gradient.

    ``mode`` d chooses them once, by their Fisher information for the task; f draws others each step. Raises
    SpecError for values that make no sense.
    """

    mode: str = "d"
    share: float = 0.3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SpecError(f"unknown mode {self.mode!r} of child-tuning; {nearest(str(self.mode), MODES)}")
        _check_share("share", self.share, 0 < self.share <= 1 if _is_number(self.share) else False, "above 0, up to 1")


@named_fields
@dataclass(frozen=True)
class TopK:
    """Only the upper ``layers`` layers and the head are trained. Raises SpecError for fewer than one."""

    layers: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise SpecError(f"layers of top-k is {self.layers!r}; expected a whole number from 1 up")


Options = Mixout | ChildTuning | TopK
REGULARISED: Mapping[str, type[Options]] = {MIXOUT: Mixout, CHILD_TUNING: ChildTuning, TOP_K: TopK}
SPECS: Mapping[str, type[Probe | Full | Options]] = {PROBE: Probe, FULL: Full, **REGULARISED}
"""The specs of the methods that are no kind of delta, by the methods' names."""


def read_options(method: str, values: Values) -> Options:
    """The options of a regularised form from JSON or flags. Raises SpecError, naming the nearest known field."""
    check_fits(f"{method} has no field", values, [field.name for field in fields(REGULARISED[method])])
    return REGULARISED[method](**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_share(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise SpecError(f"{name} is {value!r}; expected a number {expected}")
