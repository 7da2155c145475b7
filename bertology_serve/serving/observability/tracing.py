"""OpenTelemetry spans: one for each call, below it the time in the queue and the batch. Texts are in none of them.

Only the API is used: without a configured SDK (``opentelemetry-instrument bertology-serve serve --traces ...``) the
spans go nowhere. A caller's ``traceparent`` is continued.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope

from bertology_serve.errors import Unsupported
from bertology_serve.serving.batching.scheduler import Item


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

    def items(self, items: Sequence[Item], outcome: str, now: float) -> None:
        """What became of a call's items, below the span of that call; ``now`` on the clock of ``time.monotonic``."""
        epoch = time.time() - time.monotonic()
        deltas = sorted({item.delta for item in items})
        facts: dict[str, Any] = {
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
