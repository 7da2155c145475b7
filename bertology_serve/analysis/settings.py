"""The settings of each analysis; their help is that of the command line. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bertology_serve.errors import SpecError


def at_least_one(settings: object, *names: str) -> None:
    """Raises SpecError for a field below 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SpecError(f"{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class AttentionSettings:
    """How attention is looked at."""

    max_length: int = field(default=128, metadata={"help": "Tokens a sequence is cut to."})
    max_tokens: int = field(default=2048, metadata={"help": "Tokens a batch: bounds the maps that are held at once."})
    most: int | None = field(default=None, metadata={"help": "Take the first so many texts."})
    clusters: int = field(default=6, metadata={"help": "Clusters of heads."})
    js_rows: int = field(default=4096, metadata={"help": "Rows that divergences between heads are measured on."})
    fewest_arcs: int = field(default=20, metadata={"help": "Relations with fewer dependencies are not looked at."})

    def __post_init__(self) -> None:
        at_least_one(self, "max_length", "max_tokens", "most", "clusters", "js_rows", "fewest_arcs")


@dataclass(frozen=True)
class HeadSettings:
    """How heads are judged. Raises SpecError for values that make no sense."""

    steps: int = field(default=10, metadata={"help": "Equal steps from no head masked to all of them."})
    seeds: int = field(default=3, metadata={"help": "Random orders to compare with."})
    seed: int = field(default=0, metadata={"help": "Seed of the random orders."})
    most: int | None = field(default=None, metadata={"help": "Measure importance on the first so many records."})
    leave_one_out: bool = field(default=False, metadata={"help": "Mask each head alone too: a pass over --input each."})
    tolerance: float = field(default=0.01, metadata={"help": "How far the metric may fall, as a fraction."})
    max_tokens: int = field(default=4096, metadata={"help": "Tokens a batch."})

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "most", "max_tokens")
        if self.seeds < 0:
            raise SpecError(f"seeds is {self.seeds}; expected 0 or more")


@dataclass(frozen=True)
class PruneSettings:
    """What goes, and how what is left is measured. Raises SpecError for values that make no sense."""

    heads: float = field(default=0.3, metadata={"help": "Share of all attention heads that goes."})
    neurons: float = field(default=0.0, metadata={"help": "Share of all FFN neurons that goes."})
    multiple: int = field(default=8, metadata={"help": "Neurons a layer stay a multiple of this."})
    most: int | None = field(default=None, metadata={"help": "Measure importance on the first so many records."})
    max_tokens: int = field(default=2048, metadata={"help": "Tokens a batch."})
    atol: float = field(default=1e-5, metadata={"help": "Largest difference from the masked model that is accepted."})
    rounds: int = field(default=5, metadata={"help": "Turns in which both encoders are timed, one after the other."})

    def __post_init__(self) -> None:
        at_least_one(self, "multiple", "most", "max_tokens", "rounds")
        for name in ("heads", "neurons"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; expected a share from 0 up to, not including, 1")
        if not self.atol > 0:
            raise SpecError(f"atol is {self.atol}; expected a number above 0, such as 1e-5")


@dataclass(frozen=True)
class ProbeSettings:
    """How layers are probed. Raises SpecError for values that make no sense."""

    tasks: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Among length, position, content, tags, depth, label. Default: all that the records can answer."
        },
    )
    rows: int = field(
        default=10_000, metadata={"help": "Most texts or words that one probe trains on, and is judged on."}
    )
    most: int | None = field(default=None, metadata={"help": "Take the first so many records of each file."})
    pooling: Literal["mean", "max", "cls"] = field(default="mean", metadata={"help": "How a text's rows become one."})
    code: bool = field(default=True, metadata={"help": "Measure the online code too."})
    mix: bool = field(default=True, metadata={"help": "Fit a probe on a mix of all layers too."})
    penalty: float = field(default=1e-3, metadata={"help": "Weight of the probe's squared norm."})
    seed: int = field(default=0, metadata={"help": "Seed of samples, the held-out quarter and control labels."})
    max_length: int = field(default=128, metadata={"help": "Tokens a sequence is cut to."})
    max_tokens: int = field(default=4096, metadata={"help": "Tokens a batch."})

    def __post_init__(self) -> None:
        at_least_one(self, "rows", "most", "max_length", "max_tokens")
        if self.penalty <= 0:
            raise SpecError(f"penalty is {self.penalty}; expected more than 0")


@dataclass(frozen=True)
class DistanceSettings:
    """How features are compared with the base's."""

    most: int | None = field(default=512, metadata={"help": "Compare features on the first so many texts."})
    max_length: int = field(default=128, metadata={"help": "Tokens a sequence is cut to."})
    max_tokens: int = field(default=4096, metadata={"help": "Tokens a batch."})

    def __post_init__(self) -> None:
        at_least_one(self, "most", "max_length", "max_tokens")


@dataclass(frozen=True)
class CompareSettings:
    """How two deltas are compared. Raises SpecError for values that make no sense."""

    most: int | None = field(default=None, metadata={"help": "Take the first so many records."})
    shown: int = field(default=8, metadata={"help": "Disagreements that are looked into, the widest gaps first."})
    attributions: bool = field(default=True, metadata={"help": "Show what each token adds (needs captum)."})
    steps: int = field(default=32, metadata={"help": "Steps of integrated gradients."})
    max_tokens: int = field(default=4096, metadata={"help": "Tokens a batch."})

    def __post_init__(self) -> None:
        at_least_one(self, "most", "steps", "max_tokens")
        if self.shown < 0:
            raise SpecError(f"shown is {self.shown}; expected 0 or more")
