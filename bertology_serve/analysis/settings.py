"""The settings of each analysis; their help is that of the command line. Values that make no sense are a SpecError.
Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bertology_serve.config_fields import check_fields, option
from bertology_serve.errors import SpecError

LENGTH, TOKENS, TEXTS = "Tokens a sequence is cut to.", "Tokens a batch.", "Take the first so many texts."


class _Settings:
    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class AttentionSettings(_Settings):
    """How attention is looked at."""

    max_length: int = option(128, LENGTH, least=1)
    max_tokens: int = option(2048, "Tokens a batch: bounds the maps that are held at once.", least=1)
    most: int | None = option(None, TEXTS, least=1)
    clusters: int = option(6, "Clusters of heads.", least=1)
    js_rows: int = option(4096, "Rows that divergences between heads are measured on.", least=1)
    fewest_arcs: int = option(20, "Relations with fewer dependencies are not looked at.", least=1)


@dataclass(frozen=True)
class HeadSettings(_Settings):
    """How heads are judged."""

    steps: int = option(10, "Equal steps from no head masked to all of them.", least=1)
    seeds: int = option(3, "Random orders to compare with.", least=0)
    seed: int = option(0, "Seed of the random orders.")
    most: int | None = option(None, "Measure importance on the first so many records.", least=1)
    leave_one_out: bool = option(False, "Mask each head alone too: a pass over --input each.")
    tolerance: float = option(0.01, "How far the metric may fall, as a fraction.")
    max_tokens: int = option(4096, TOKENS, least=1)


@dataclass(frozen=True)
class PruneSettings(_Settings):
    """What goes, and how what is left is measured. Raises SpecError for values that make no sense."""

    heads: float = option(0.3, "Share of all attention heads that goes.")
    neurons: float = option(0.0, "Share of all FFN neurons that goes.")
    multiple: int = option(8, "Neurons a layer stay a multiple of this.", least=1)
    most: int | None = option(None, "Measure importance on the first so many records.", least=1)
    max_tokens: int = option(2048, TOKENS, least=1)
    atol: float = option(1e-5, "Largest difference from the masked model that is accepted.")
    rounds: int = option(5, "Turns in which both encoders are timed, one after the other.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "neurons"):
            if not 0 <= getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; expected a share from 0 up to, not including, 1")
        if not self.atol > 0:
            raise SpecError(f"atol is {self.atol}; expected a number above 0, such as 1e-5")


@dataclass(frozen=True)
class ProbeSettings(_Settings):
    """How layers are probed. Raises SpecError for values that make no sense."""

    tasks: tuple[str, ...] = option(
        (), "Among length, position, content, tags, depth, label. Default: all that the records can answer."
    )
    rows: int = option(10_000, "Most texts or words that one probe trains on, and is judged on.", least=1)
    most: int | None = option(None, "Take the first so many records of each file.", least=1)
    pooling: Literal["mean", "max", "cls"] = option("mean", "How a text's rows become one.")
    code: bool = option(True, "Measure the online code too.")
    mix: bool = option(True, "Fit a probe on a mix of all layers too.")
    penalty: float = option(1e-3, "Weight of the probe's squared norm.")
    seed: int = option(0, "Seed of samples, the held-out quarter and control labels.")
    max_length: int = option(128, LENGTH, least=1)
    max_tokens: int = option(4096, TOKENS, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty <= 0:
            raise SpecError(f"penalty is {self.penalty}; expected more than 0")


@dataclass(frozen=True)
class DistanceSettings(_Settings):
    """How features are compared with the base's."""

    most: int | None = option(512, "Compare features on the first so many texts.", least=1)
    max_length: int = option(128, LENGTH, least=1)
    max_tokens: int = option(4096, TOKENS, least=1)


@dataclass(frozen=True)
class CompareSettings(_Settings):
    """How two deltas are compared."""

    most: int | None = option(None, "Take the first so many records.", least=1)
    shown: int = option(8, "Disagreements that are looked into, the widest gaps first.", least=0)
    attributions: bool = option(True, "Show what each token adds (needs captum).")
    steps: int = option(32, "Steps of integrated gradients.", least=1)
    max_tokens: int = option(4096, TOKENS, least=1)
