"""How the server logs and traces: lines for people, JSON objects for machines, OpenTelemetry spans. Texts are in none.

Faults are told by their place. There is a span for each call, below it the time in the queue and the batch; only the
API is used: without a configured SDK (``opentelemetry-instrument bertology-serve serve --traces ...``) the spans go
nowhere. A caller's ``traceparent`` is continued."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from starlette.types import Scope

from bertology_serve.errors import Unsupported, printable
from bertology_serve.files import JsonObject

if TYPE_CHECKING:
    from bertology_serve.serving.batching.scheduler import CallItem

CHATTY = ("uvicorn.error", "httpx", "transformers", "grpc")
CALL = "call"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, message, and what a record of a call says of it."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
        return msgspec.json.encode(line | getattr(record, CALL, {})).decode()


def set_up(level: str, kind: str, stream: TextIO | None = None) -> None:
    """Logs of that level and above go to ``stream`` (stderr), as ``text`` or ``json``."""
    handler = logging.StreamHandler(stream or sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if kind == "json" else plain)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def call(log: logging.Logger, method: str, path: str, status: int, seconds: float, key: str, request: str) -> None:
    """Notes one call, without its body and its query."""
    facts = {"method": method, "path": path, "status": status, "ms": round(1e3 * seconds, 3), "key": key,
             "request_id": request}  # fmt: skip
    log.info("%s %s %d %.1f ms %s %s", method, path, status, 1e3 * seconds, key, request, extra={CALL: facts})


def place_of(problem: BaseException) -> str:
    """Type, file and line of an error; never its message, which may hold somebody's text."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "an unknown place"
    return f"{type(problem).__name__} at {where}"


class Tracing:
    """Makes the spans of one server. Unsupported without the package ``opentelemetry-api``."""

    def __init__(self) -> None:
        try:
            from opentelemetry import propagate, trace
        except ImportError:
            raise Unsupported("--traces needs opentelemetry-api: pip install 'bertology-serve[otel]'") from None
        self._extract, self._server = propagate.extract, trace.SpanKind.SERVER
        self._tracer = trace.get_tracer("bertology_serve")

    @contextmanager
    def call(self, scope: Scope) -> Iterator[Any]:
        """The span of one HTTP call; ``set_attribute`` of what is given adds to it."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        facts = {"http.request.method": scope["method"], "url.path": scope["raw_path"].decode("ascii", "replace")}
        with self._tracer.start_as_current_span(
            scope["method"], self._extract(headers), self._server, facts, record_exception=False
        ) as span:
            yield span

    def items(self, items: Sequence[CallItem], outcome: str, now: float) -> None:
        """What became of a call's items, below the span of that call; ``now`` on the clock of ``time.monotonic``."""
        epoch = time.time() - time.monotonic()
        deltas = sorted({item.delta for item in items})
        facts: JsonObject = {
            "bertology.items": len(items),
            "bertology.tokens": sum(item.cost for item in items),
            "bertology.deltas": deltas[:16],
            "bertology.outcome": outcome,
        }
        came = min(item.arrived for item in items)
        begun = [item.started for item in items if item.started]
        if not came:
            return  # refused before it was queued
        parts = [("queue", came, min(begun, default=now))] + ([("batch", min(begun), now)] if begun else [])
        for name, start, end in parts:
            span = self._tracer.start_span(name, attributes=facts, start_time=round(1e9 * (epoch + start)))
            span.end(round(1e9 * (epoch + end)))
