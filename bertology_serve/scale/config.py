"""What the router and the planner can be told. The command line takes its options from here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from bertology_serve.config_fields import check_fields, option
from bertology_serve.errors import NotFound, SpecError
from bertology_serve.serving.config import LimitsConfig, LoggingConfig, StoppingConfig

_URL = re.compile(r"https?://[a-z0-9.\[\]:_-]+", re.IGNORECASE)
KEY = "BERTOLOGY_ROUTER_KEY"
OMITTED = (
    "max_items", "max_item_tokens", "max_text_characters", "log_calls", "traces", "max_metric_deltas",
)  # fmt: skip
"""Options of a server that are of no use to a router: its replicas see to them."""


@dataclass(frozen=True)
class ReplicaConfig:
    """Which replicas there are, and how they are watched. SpecError for values that make no sense."""

    replicas: tuple[str, ...] = option((), "Addresses of the replicas: http://HOST:PORT,...")
    replicas_file: Path | None = field(
        default=None,
        metadata={"help": "File with an address on each line, in place of --replicas. Followed as it changes."},
    )
    state_file: Path | None = field(
        default=None,
        metadata={
            "help": "Where the router keeps what is wanted of each delta, so that it survives a restart; as the "
            "replicas' own --state-file has it. Without it that is kept in memory."
        },
    )
    poll_seconds: float = option(0.25, "How often each replica is asked whether it is ready.")

    def __post_init__(self) -> None:
        if bool(self.replicas) == (self.replicas_file is not None):
            raise SpecError("expected --replicas or --replicas-file, one of the two")
        if not 0.01 <= self.poll_seconds <= 60:
            raise SpecError(f"poll_seconds is {self.poll_seconds}; expected 0.01 to 60")
        checked_addresses(self.replicas, "--replicas")

    def addresses(self) -> tuple[str, ...]:
        """The replicas' addresses as they are now. NotFound, SpecError where the file does not say."""
        if self.replicas_file is None:
            return checked_addresses(self.replicas, "--replicas")
        try:
            lines = self.replicas_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise NotFound(f"cannot read {self.replicas_file}: {problem}; expected an address on each line") from None
        named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not named:  # as one that is being written may be
            raise SpecError(f"{self.replicas_file} names no replica; expected an address on each line")
        return checked_addresses(named, str(self.replicas_file))


@dataclass(frozen=True)
class RouteConfig:
    """Where the router listens. SpecError for values that make no sense."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8080, "Port to listen on; 0 takes a free one.")
    ext_proc_port: int | None = option(
        None,
        "Port where Envoy asks which replica a call should go to, as its ext_proc filter does; 0 takes a free one. "
        "Without it there is none. Needs the extra envoy.",
    )
    max_connections: int = option(1024, "Most connections at once; a newcomer takes the place of the idlest one.")
    max_call_seconds: float = option(
        35.0, "Longest that a replica may take over a call: above its own --max-call-seconds. Beyond that 504."
    )

    def __post_init__(self) -> None:
        ports = self.port, self.ext_proc_port or 0
        if (
            not 0 <= min(ports) <= max(ports) <= 65_535
            or self.max_connections < 1
            or not 0 < self.max_call_seconds <= 86_400
        ):
            raise SpecError("expected a port from 0 to 65535, a connection or more, and seconds above 0")


@dataclass(frozen=True)
class RouterConfig:
    """The router's options, by concern."""

    replicas: ReplicaConfig = field(metadata={"panel": "Replicas"})
    listen: RouteConfig = field(default_factory=RouteConfig, metadata={"panel": "Listening"})
    limits: LimitsConfig = field(default_factory=LimitsConfig, metadata={"panel": "Limits of a call"})
    stopping: StoppingConfig = field(default_factory=StoppingConfig, metadata={"panel": "Stopping"})
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={"panel": "Logs"})


@dataclass(frozen=True)
class TrafficConfig:
    """What is asked. SpecError for values that make no sense."""

    deltas: int = field(metadata={"help": "How many deltas there are.", "least": 1})
    calls: float | None = option(None, "Calls a second, each of one text.", least=1e-6)
    tokens: float | None = option(None, "Tokens a second, in place of --calls.", least=1e-6)
    ranks: tuple[int, ...] = option((8,), "Ranks of the deltas, in turn.")
    zipf: float = option(1.1, "The k-th delta is asked as often as k to the power of minus this.", least=0, most=10)
    mean_tokens: float = option(24.0, "Tokens of a text on average; lengths are lognormal.", least=1)
    spread: float = option(0.6, "Standard deviation of the lengths' logarithm; 0: all are equally long.", least=0)
    longest: int = option(512, "Tokens beyond which texts are cut.", least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.calls is None) == (self.tokens is None):
            raise SpecError("expected --calls or --tokens, one of the two")
        if not self.ranks or min(self.ranks) < 1:
            raise SpecError(f"ranks is {self.ranks}; expected numbers from 1")

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls if self.calls is not None else (self.tokens or 0.0) / self.mean_tokens


@dataclass(frozen=True)
class HardwareConfig:
    """What a replica is. What is not given is looked for. SpecError for values that make no sense."""

    replicas: int | None = option(None, "So many replicas. Without it: as few as meet the targets.", least=1)
    device_mb: float | None = option(
        None, "Memory of each for resident deltas, in MiB. Without it: as little as meets the hit rate.", least=1e-6
    )
    host_mb: float = option(1024.0, "Memory of each for deltas that had to leave the device, in MiB.", least=0)
    replica_cost: float = option(0.0, "What one costs an hour, in any currency.", least=0)
    most_replicas: int = option(10_000, "Replicas beyond which there is no more looking.", least=1)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TargetConfig:
    """What calls should meet. SpecError for values that make no sense."""

    p50_ms: float | None = option(None, "Half of the calls are answered within so many milliseconds.", least=0)
    p99_ms: float | None = option(None, "99 of a hundred calls are.", least=0)
    hit_rate: float = option(0.95, "Share of calls that meet a resident delta.", least=0, most=0.9999)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PlanConfig:
    """All that a plan depends on beside the calibration."""

    traffic: TrafficConfig = field(metadata={"panel": "Traffic"})
    hardware: HardwareConfig = field(default_factory=HardwareConfig, metadata={"panel": "Hardware"})
    targets: TargetConfig = field(default_factory=TargetConfig, metadata={"panel": "Targets"})


def checked_addresses(named: list[str] | tuple[str, ...], where: str) -> tuple[str, ...]:
    """The addresses without a slash at their end, each once; SpecError for what is none."""
    for one in named:
        if not _URL.fullmatch(one.rstrip("/")):
            raise SpecError(f"{where}: {one[:80]!r} is no address; expected http://HOST:PORT without a path")
    return tuple(dict.fromkeys(one.rstrip("/") for one in named))
