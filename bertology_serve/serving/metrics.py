"""What the server measures, for Prometheus. Names begin with ``bertology_``; durations are in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from bertology_serve.serving.affinity import Affinity
from bertology_serve.serving.queue import WorkQueue
from bertology_serve.serving.statistics import Statistics
from bertology_serve.serving.tracing import Tracing
from bertology_serve.serving.work import Work

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
ANSWERED, REFUSED, FAILED, DROPPED, EXPIRED = "answered", "refused", "failed", "dropped", "expired"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One server's counters, in a registry of their own. ``most_deltas`` are named, later ones are ``other``;
    ``statistics`` are those of the Open Inference Protocol; ``tracing`` makes spans where it is set."""

    def __init__(self, most_deltas: int = 200) -> None:
        self._most, self._named = most_deltas, set[str]()
        self.registry = CollectorRegistry()
        self.statistics = Statistics()
        self.tracing: Tracing | None = None
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        own = self.registry
        self._items = Counter("bertology_items", "Items by delta and outcome", ("delta", "outcome"), registry=own)
        self._tokens = Counter(
            "bertology_tokens", "Tokens answered by delta, prompts included", ("delta",), registry=own
        )
        self._latency = Histogram(
            "bertology_item_seconds", "From queueing an item to its answer", ("delta",), buckets=_SECONDS, registry=own
        )
        self._calls = Counter("bertology_calls", "Calls by HTTP status", ("status",), registry=own)
        self._batch = Histogram("bertology_batch_seconds", "Time of one batch", buckets=_SECONDS, registry=own)
        self._batch_tokens = Histogram("bertology_batch_tokens", "Tokens in one batch", buckets=_TOKENS, registry=own)
        self._batch_items = Histogram("bertology_batch_items", "Items in one batch", buckets=_COUNTS, registry=own)
        self._batch_deltas = Histogram("bertology_batch_deltas", "Deltas in one batch", buckets=_COUNTS, registry=own)
        self._shadows = Counter(
            "bertology_shadow_items", "Items that shadows were asked too", ("delta", "version", "outcome"), registry=own
        )
        self._deltas = Gauge("bertology_deltas", "Deltas that answer", registry=own)

    def watch(self, queue: WorkQueue) -> None:
        """Shows what waits in a queue."""
        items = Gauge("bertology_queue_items", "Items waiting", registry=self.registry)
        tokens = Gauge("bertology_queue_tokens", "Tokens waiting", registry=self.registry)
        items.set_function(lambda: queue.items)
        tokens.set_function(lambda: queue.tokens)
        budget = Gauge("bertology_batch_budget_tokens", "Tokens that a batch may hold now", registry=self.registry)
        budget.set_function(lambda: queue.times.budget)

    def batch(self, works: Sequence[Work], seconds: float) -> None:
        """Notes one batch that ran."""
        self._batch.observe(seconds)
        self._batch_tokens.observe(sum(work.cost for work in works))
        self._batch_items.observe(len(works))
        self._batch_deltas.observe(len({work.delta for work in works}))
        self.statistics.batch(works, seconds, time.monotonic())

    def finished(self, works: Sequence[Work], outcome: str, now: float) -> None:
        """Notes what became of queued items; ``now`` is the time of the queue's clock."""
        if self.tracing:
            self.tracing.works(works, outcome, now)
        if outcome in (ANSWERED, FAILED):
            self.statistics.finished(works, outcome == ANSWERED, now)
        for work in works:
            name = self._label(work.delta)
            self._child(self._items, (name, outcome)).inc()
            if outcome == ANSWERED:
                self._child(self._tokens, (name,)).inc(work.cost)
                self._child(self._latency, (name,)).observe(now - work.arrived)

    def refused(self, items: Mapping[str, int]) -> None:
        """Notes how many items of each delta were refused before they were read."""
        for delta, count in items.items():
            self._child(self._items, (self._label(delta), REFUSED)).inc(count)

    def shadow(self, delta: str, version: str, outcome: str) -> None:
        """Notes whether a shadow decided as the version that answered."""
        self._child(self._shadows, (self._label(delta), version, outcome)).inc()

    def call(self, status: int) -> None:
        """Notes the status of one call."""
        self._child(self._calls, (str(status),)).inc()

    def _child(self, metric: Any, labels: tuple[str, ...]) -> Any:
        """The metric of those labels; found faster than ``labels()`` finds it, four times a call."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = metric.labels(*labels)
        return child

    def _label(self, delta: str) -> str:
        if delta in self._named:
            return delta
        if len(self._named) >= self._most:
            return OTHER
        self._named.add(delta)
        return delta

    def deltas(self, count: int) -> None:
        """Notes how many deltas answer."""
        self._deltas.set(count)

    def affinity(self, resident: Callable[[], Iterable[str]], waiting: Callable[[], Iterable[str]], slots: int) -> None:
        """Shows which deltas are here, in the gauge that Kubernetes' endpoint pickers route by."""
        self.registry.register(Affinity(resident, waiting, slots))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
