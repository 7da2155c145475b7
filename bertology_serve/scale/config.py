"""What the router can be told. The command line takes its options from here, the environment as ``serve`` does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from bertology_serve.config_fields import option
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
    max_connections: int = option(1024, "Most connections at once; a newcomer takes the place of the idlest one.")
    max_call_seconds: float = option(
        35.0, "Longest that a replica may take over a call: above its own --max-call-seconds. Beyond that 504."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535 or self.max_connections < 1 or not 0 < self.max_call_seconds <= 86_400:
            raise SpecError("expected a port from 0 to 65535, a connection or more, and seconds above 0")


@dataclass(frozen=True)
class RouterConfig:
    """The router's options, by concern."""

    replicas: ReplicaConfig = field(metadata={"panel": "Replicas"})
    listen: RouteConfig = field(default_factory=RouteConfig, metadata={"panel": "Listening"})
    limits: LimitsConfig = field(default_factory=LimitsConfig, metadata={"panel": "Limits of a call"})
    stopping: StoppingConfig = field(default_factory=StoppingConfig, metadata={"panel": "Stopping"})
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={"panel": "Logs"})


def checked_addresses(named: list[str] | tuple[str, ...], where: str) -> tuple[str, ...]:
    """The addresses without a slash at their end, each once; SpecError for what is none."""
    for one in named:
        if not _URL.fullmatch(one.rstrip("/")):
            raise SpecError(f"{where}: {one[:80]!r} is no address; expected http://HOST:PORT without a path")
    return tuple(dict.fromkeys(one.rstrip("/") for one in named))
