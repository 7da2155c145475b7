"""What the server can be told, every limit in one place. The command line takes its options from here."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from bertology_serve.errors import SpecError

HELPS = {
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "grpc_port": "Port for the Open Inference Protocol over gRPC; 0 takes a free one. Without it there is none. "
    "Needs the extra grpc.",
    "max_batch_ms": "Longest that a batch may take, in milliseconds; how many tokens that is, is found at start-up. "
    "Longer where its fixed part would be more than a fifth of it, as with large encoders, and no deadline forbids.",
    "max_batch_tokens": "Most tokens in one batch of several items, however fast the machine.",
    "max_queue_tokens": "Most tokens waiting; beyond that, calls are answered 503 with Retry-After.",
    "max_delta_tokens": "Most tokens waiting for one delta; beyond that 429 with Retry-After.",
    "max_call_seconds": "Longest that a call may wait; it is then answered 504, and what was queued is not computed. "
    "Calls may ask for less: header X-Request-Timeout-Ms, or parameter timeout (microseconds) of /v2.",
    "weights": "Shares of the deltas when all have work waiting: NAME=WEIGHT,... The others have 1.",
    "max_item_tokens": "Most tokens of one item, all its windows or choices together; beyond that 413.",
    "max_text_characters": "Longest text of one item; beyond that 413. Texts are cut to the delta's maximum length.",
    "max_items": "Most items in one call; beyond that 413.",
    "keys_file": 'JSON file of API keys: {"keys": [{"name", "key" or "sha256", "admin", "deltas", ...}]}. '
    "BERTOLOGY_API_KEYS and BERTOLOGY_ADMIN_KEYS add plain ones. Without keys every route but management is open.",
    "max_header_bytes": "Largest path and headers of a call; beyond that 431.",
    "max_body_bytes": "Largest body of a call, decompressed; beyond that 413.",
    "max_body_seconds": "Longest that a client may take over a head, a body, or reading an answer; beyond that 408, or "
    "the connection is cut.",
    "max_connections": "Most connections at once; a newcomer takes the place of the one that has been idle longest.",
    "max_metric_deltas": "Most deltas that metrics name; those that come later are counted together, as 'other'.",
    "device_mb": "Memory for the deltas that are resident, in MiB of their tensors; others wait on disk until they are "
    "asked. Without it all of them are resident.",
    "host_mb": "Memory for deltas that had to leave the device, in MiB: they come back without being read.",
    "max_cold_calls": "Most calls that wait for deltas to be loaded; beyond that 503 with Retry-After.",
    "state_file": "JSON file of the desired state: version, canary, shadow, weight, pin of each delta. It is followed.",
    "watch_seconds": "Look at the directory of deltas that often: new versions answer, what has gone is taken away. "
    "0: only when told to, by /v2/repository.",
    "drain_seconds": "How long to go on accepting calls after SIGTERM while readiness already answers 503.",
    "shutdown_seconds": "How long accepted calls may take to finish after that.",
    "cors_origin": "Web pages that may call from a browser: https://HOST[:PORT],... or *. Without it none may.",
    "gzip_bytes": "Compress answers of at least that many bytes for callers that accept gzip; 0: never.",
    "log_format": "Lines for people, or JSON objects for machines.",
    "log_calls": "Log every call: method, path, status, milliseconds, and the name of its key. No texts.",
    "traces": "OpenTelemetry spans of calls, queue and batches; needs the extra otel and a configured SDK.",
    "log_level": "What to log on stderr; texts are never logged.",
}

_ORIGIN = re.compile(r"\*|https?://[a-z0-9.\[\]:-]+", re.IGNORECASE)


@dataclass(frozen=True)
class ServerConfig:
    """The server's options; ``HELPS`` says what each is. SpecError for values that make no sense."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    max_batch_ms: float = 50.0
    max_batch_tokens: int = 8192
    max_queue_tokens: int = 65_536
    max_delta_tokens: int = 32_768
    max_call_seconds: float = 30.0
    weights: tuple[str, ...] = ()
    max_item_tokens: int = 8192
    max_text_characters: int = 100_000
    max_items: int = 1024
    max_header_bytes: int = 16_384
    max_body_bytes: int = 4 * 2**20
    max_body_seconds: float = 20.0
    max_connections: int = 1024
    max_metric_deltas: int = 200
    device_mb: int | None = None
    host_mb: int = 1024
    max_cold_calls: int = 256
    state_file: Path | None = None
    keys_file: Path | None = None
    watch_seconds: float = 0.0
    drain_seconds: float = 1.0
    shutdown_seconds: float = 30.0
    cors_origin: tuple[str, ...] = ()
    gzip_bytes: int = 0
    log_format: Literal["text", "json"] = "text"
    log_calls: bool = False
    traces: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name.startswith("max_")):
            least = 0.01 if name.endswith("_seconds") else 1
            if not least <= getattr(self, name) <= 1e12:
                raise SpecError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("port", "grpc_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65_535:
                raise SpecError(f"{name} is {getattr(self, name)}; expected 0 to 65535")
        if min(self.watch_seconds, self.drain_seconds, self.shutdown_seconds) < 0:
            raise SpecError("watch_seconds, drain_seconds and shutdown_seconds are durations; expected numbers from 0")
        if self.host_mb < 0 or (self.device_mb is not None and self.device_mb < 1):
            raise SpecError("device_mb and host_mb are sizes in MiB; expected at least 1, and 0")
        if self.gzip_bytes < 0:
            raise SpecError(f"gzip_bytes is {self.gzip_bytes}; expected at least 1, or 0 for never")
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise SpecError(f"cors_origin {origin[:80]!r}; expected https://HOST[:PORT] without a path, or *")
        for name in ("max_queue_tokens", "max_delta_tokens"):
            if getattr(self, name) < self.max_item_tokens:
                raise SpecError(
                    f"{name} ({getattr(self, name)}) is below max_item_tokens ({self.max_item_tokens}): "
                    "the largest item could never wait; raise the one or lower the other"
                )
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
