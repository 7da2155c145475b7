"""What the server can be told, every limit in one place, by concern. The command line takes its options from here.

Where an option is given more than once, a flag wins over the environment (``BERTOLOGY_MAX_ITEMS`` for ``--max-items``),
that over the file of ``--config``, and that over the default here.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bertology_serve.config_fields import choices_of, nested, option
from bertology_serve.errors import FormatError, SpecError, nearest

EnginePrecision = Literal["fp32", "bf16", "int8-row"]
_ORIGIN = re.compile(r"\*|https?://[a-z0-9.\[\]:-]+", re.IGNORECASE)


def _check_largest(config: object) -> None:
    """SpecError for a limit below what makes sense."""
    for name, value in vars(config).items():
        least = 0.01 if name.endswith("_seconds") else 1
        if name.startswith("max_") and not least <= value <= 1e12:
            raise SpecError(f"{name} is {value}; expected at least {least}")


@dataclass(frozen=True)
class ListenConfig:
    """Where the server listens, and for whom. SpecError for values that make no sense."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    grpc_port: int | None = option(
        None,
        "Port for the Open Inference Protocol over gRPC; 0 takes a free one. Without it there is none. "
        "Needs the extra grpc.",
    )
    keys_file: Path | None = option(
        None,
        'JSON file of API keys: {"keys": [{"name", "key" or "sha256", "admin", "deltas", ...}]}. '
        "BERTOLOGY_API_KEYS and BERTOLOGY_ADMIN_KEYS add plain ones. Without keys every route but "
        "management is open.",
    )
    cors_origin: tuple[str, ...] = option(
        (), "Web pages that may call from a browser: https://HOST[:PORT],... or *. Without it none may."
    )
    max_connections: int = option(
        1024, "Most connections at once; a newcomer takes the place of the one that has been idle longest."
    )
    gzip_bytes: int = option(0, "Compress answers of at least that many bytes for callers that accept gzip; 0: never.")

    def __post_init__(self) -> None:
        _check_largest(self)
        for name in ("port", "grpc_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65_535:
                raise SpecError(f"{name} is {getattr(self, name)}; expected 0 to 65535")
        if self.gzip_bytes < 0:
            raise SpecError(f"gzip_bytes is {self.gzip_bytes}; expected at least 1, or 0 for never")
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise SpecError(f"cors_origin {origin[:80]!r}; expected https://HOST[:PORT] without a path, or *")


@dataclass(frozen=True)
class DeltaConfig:
    """Which deltas answer, and what room they have. SpecError for values that make no sense."""

    device_mb: int | None = option(
        None,
        "Memory for the deltas that are resident, in MiB of their tensors; others wait on disk until they "
        "are asked. Without it all of them are resident.",
    )
    host_mb: int = option(
        1024, "Memory for deltas that had to leave the device, in MiB: they come back without being read."
    )
    max_cold_calls: int = option(256, "Most calls that wait for deltas to be loaded; beyond that 503 with Retry-After.")
    state_file: Path | None = option(
        None, "JSON file of the desired state: version, canary, shadow, weight, pin of each delta. Followed."
    )
    redaction_file: Path | None = option(
        None,
        'JSON file for redaction: {"key": "of hashes", "patterns": {"ORDER": "a regular expression"}}. '
        "Without a key hashes are plain SHA-256.",
    )
    watch_seconds: float = option(
        0.0,
        "Look at the directory of deltas that often: new versions answer, what has gone is taken away. 0: "
        "only when told to, by /v2/repository.",
    )

    def __post_init__(self) -> None:
        _check_largest(self)
        if self.watch_seconds < 0:
            raise SpecError(f"watch_seconds is {self.watch_seconds}; expected a number from 0")
        if self.host_mb < 0 or (self.device_mb is not None and self.device_mb < 1):
            raise SpecError("device_mb and host_mb are sizes in MiB; expected at least 1, and 0")


@dataclass(frozen=True)
class BatchingConfig:
    """How large batches are, how much may wait for them, and how long. SpecError for values that make no sense."""

    max_batch_ms: float = option(
        50.0,
        "Longest that a batch may take, in milliseconds; how many tokens that is, is found at start-up. "
        "Longer where its fixed part would be more than a fifth of it, as with large encoders, and no "
        "deadline forbids.",
    )
    max_batch_tokens: int = option(8192, "Most tokens in one batch of several items, however fast the machine.")
    max_queue_tokens: int = option(65_536, "Most tokens waiting; beyond that, calls are answered 503 with Retry-After.")
    max_delta_tokens: int = option(32_768, "Most tokens waiting for one delta; beyond that 429 with Retry-After.")
    max_call_seconds: float = option(
        30.0,
        "Longest that a call may wait; it is then answered 504, and what was queued is not computed. Calls "
        "may ask for less: header X-Request-Timeout-Ms, or parameter timeout (microseconds) of /v2.",
    )
    weights: tuple[str, ...] = option(
        (), "Shares of the deltas when all have work waiting: NAME=WEIGHT,... The others have 1."
    )

    def __post_init__(self) -> None:
        _check_largest(self)
        self.weight_of()

    def weight_of(self) -> dict[str, float]:
        """The weights by delta. SpecError for what is no NAME=WEIGHT, or no weight above 0."""
        found: dict[str, float] = {}
        for part in self.weights:
            name, _, number = part.partition("=")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = 0.0
            if not name or not 1e-6 <= found[name] <= 1e6:
                raise SpecError(f"weight {part!r}; expected NAME=WEIGHT with a weight from 1e-6 to 1e6")
        return found


@dataclass(frozen=True)
class LimitsConfig:
    """The largest call that is taken. SpecError for values that make no sense."""

    max_items: int = option(1024, "Most items in one call; beyond that 413.")
    max_item_tokens: int = option(
        8192, "Most tokens of one item, all its windows or choices together; beyond that 413."
    )
    max_text_characters: int = option(
        100_000, "Longest text of one item; beyond that 413. Texts are cut to the delta's maximum length."
    )
    max_header_bytes: int = option(16_384, "Largest path and headers of a call; beyond that 431.")
    max_body_bytes: int = option(4 * 2**20, "Largest body of a call, decompressed; beyond that 413.")
    max_body_seconds: float = option(
        20.0,
        "Longest that a client may take over a head, a body, or reading an answer; beyond that 408, or the "
        "connection is cut.",
    )

    def __post_init__(self) -> None:
        _check_largest(self)


@dataclass(frozen=True)
class StoppingConfig:
    """How the server ends. SpecError for values that make no sense."""

    drain_seconds: float = option(
        1.0, "How long to go on accepting calls after SIGTERM while readiness already answers 503."
    )
    shutdown_seconds: float = option(30.0, "How long accepted calls may take to finish after that.")

    def __post_init__(self) -> None:
        if min(self.drain_seconds, self.shutdown_seconds) < 0:
            raise SpecError("drain_seconds and shutdown_seconds are durations; expected numbers from 0")


@dataclass(frozen=True)
class LoggingConfig:
    """What the server tells of itself. SpecError for values that make no sense."""

    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "What to log on stderr; texts are never logged."
    )
    log_format: Literal["text", "json"] = option("text", "Lines for people, or JSON objects for machines.")
    log_calls: bool = option(
        False, "Log every call: method, path, status, milliseconds, and the name of its key. No texts."
    )
    traces: bool = option(
        False, "OpenTelemetry spans of calls, queue and batches; needs the extra otel and a configured SDK."
    )
    max_metric_deltas: int = option(
        200, "Most deltas that metrics name; those that come later are counted together, as 'other'."
    )

    def __post_init__(self) -> None:
        _check_largest(self)


def _fitting(value: Any, hint: Any, option: str) -> Any:
    """A value as the annotation has it. SpecError where it does not fit."""
    from bertology_serve.deltas.safe_io import conform

    if Path in get_args(hint):
        return None if value is None else Path(value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise SpecError(f"{option} is {value!r}; {nearest(str(value), get_args(hint))}")
        return value
    try:
        return conform(value, hint, option)
    except FormatError as problem:
        raise SpecError(str(problem)) from None


@dataclass(frozen=True)
class ServerConfig:
    """The server's options, by concern. ``ServerConfig.of(port=8000, max_items=64)`` takes them by name.

    SpecError for values that make no sense.
    """

    listen: ListenConfig = field(default_factory=ListenConfig, metadata={"panel": "Listening"})
    deltas: DeltaConfig = field(default_factory=DeltaConfig, metadata={"panel": "Deltas"})
    batching: BatchingConfig = field(default_factory=BatchingConfig, metadata={"panel": "Batches and queue"})
    limits: LimitsConfig = field(default_factory=LimitsConfig, metadata={"panel": "Limits of a call"})
    stopping: StoppingConfig = field(default_factory=StoppingConfig, metadata={"panel": "Stopping"})
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata={"panel": "Logs and metrics"})

    def __post_init__(self) -> None:
        for name in ("max_queue_tokens", "max_delta_tokens"):
            most = getattr(self.batching, name)
            if most < self.limits.max_item_tokens:
                raise SpecError(
                    f"{name} ({most}) is below max_item_tokens ({self.limits.max_item_tokens}): "
                    "the largest item could never wait; raise the one or lower the other"
                )

    @classmethod
    def of(cls, **options: Any) -> "ServerConfig":
        """The configuration with some options given by their names. SpecError for an unknown one, or another type."""
        hints = {choice.field.name: choice.hint for choice in choices_of(cls)}
        fitting = {
            name: _fitting(value, hints[name], name) if name in hints else value for name, value in options.items()
        }
        return nested(cls, fitting, "the server has no option")
