"""What the server measures, for Prometheus and for the Open Inference Protocol's statistics extension."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.delta_set import DeltaSet
from bertology_serve.files import JsonObject
from bertology_serve.serving.batching.queue import WorkQueue
from bertology_serve.serving.batching.scheduler import CallItem
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.logs import Tracing


@dataclass
class Duration:
    """How often, and how many seconds altogether."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def as_dict(self) -> dict[str, int]:
        """With nanoseconds, as the protocol has it."""
        return {"count": self.count, "ns": round(1e9 * self.seconds)}


class VersionStatistics:
    """One version's numbers. Times of a batch count whole for each of its items: they shared it."""

    def __init__(self) -> None:
        self.success, self.fail, self.queue, self.compute = Duration(), Duration(), Duration(), Duration()
        self.batches = 0
        self.last = 0.0

    def as_dict(self, name: str, version: str) -> JsonObject:
        """One entry of ``model_stats``. Tokenising lies before the queue and is not told apart."""
        nothing = Duration().as_dict()
        return {
            "name": name,
            "version": version,
            "last_inference": round(1e3 * self.last),
            "inference_count": self.success.count,
            "execution_count": self.batches,
            "inference_stats": {
                "success": self.success.as_dict(),
                "fail": self.fail.as_dict(),
                "queue": self.queue.as_dict(),
                "compute_input": nothing,
                "compute_infer": self.compute.as_dict(),
                "compute_output": nothing,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [],
        }


class Statistics:
    """Of all deltas that answer. For any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._records: dict[tuple[str, str], VersionStatistics] = {}
        self._lock = threading.Lock()
        self._clock = clock

    def batch(self, items: Sequence[CallItem], seconds: float, now: float) -> None:
        """Notes a batch that took ``seconds`` and ended ``now``, on the clock by which the items arrived."""
        with self._lock:
            seen = set()
            for item in items:
                record = self._record(item)
                record.queue.add(max(0.0, now - seconds - item.arrived))
                record.compute.add(seconds)
                if id(record) not in seen:
                    record.batches += 1
                    seen.add(id(record))

    def finished(self, items: Iterable[CallItem], success: bool, now: float) -> None:
        with self._lock:
            for item in items:
                record = self._record(item)
                (record.success if success else record.fail).add(max(0.0, now - item.arrived))
                record.last = self._clock()

    def of(self, deltas: Iterable[Delta]) -> JsonObject:
        """``{"model_stats": [...]}`` of those deltas."""
        with self._lock:
            known = [(delta.name, delta.version) for delta in deltas]
            return {"model_stats": [self._records.get(key, VersionStatistics()).as_dict(*key) for key in known]}

    def keep(self, deltas: Iterable[Delta]) -> None:
        known = {(delta.name, delta.version) for delta in deltas}
        with self._lock:
            self._records = {key: record for key, record in self._records.items() if key in known}

    def _record(self, item: CallItem) -> VersionStatistics:
        key = item.delta, item.version
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = VersionStatistics()
        return record


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
        self._label_rows = Counter(
            "bertology_label_rows",
            "Labels of zero-shot calls, known (hit) or embedded",
            ("delta", "result"),
            registry=own,
        )
        self._latency = Histogram(
            "bertology_item_seconds", "From queueing an item to its answer", ("delta",), buckets=_SECONDS, registry=own
        )
        self._calls = Counter("bertology_calls", "Calls by HTTP status", ("status",), registry=own)
        self._batch = Histogram("bertology_batch_seconds", "Time of one batch", buckets=_SECONDS, registry=own)
        self._batch_tokens = Histogram("bertology_batch_tokens", "Tokens in one batch", buckets=_TOKENS, registry=own)
        self._shared = Counter(
            "bertology_shared_rows", "Rows that batches did not compute again for another delta", registry=own
        )
        self._batch_items = Histogram("bertology_batch_items", "Items in one batch", buckets=_COUNTS, registry=own)
        self._batch_deltas = Histogram("bertology_batch_deltas", "Deltas in one batch", buckets=_COUNTS, registry=own)
        self._shadows = Counter(
            "bertology_shadow_items", "Items that shadows were asked too", ("delta", "version", "outcome"), registry=own
        )
        self._deltas = Gauge("bertology_deltas", "Deltas that answer", registry=own)

    def watch(self, queue: WorkQueue) -> None:
        items = Gauge("bertology_queue_items", "Items waiting", registry=self.registry)
        tokens = Gauge("bertology_queue_tokens", "Tokens waiting", registry=self.registry)
        items.set_function(lambda: queue.items)
        tokens.set_function(lambda: queue.tokens)
        budget = Gauge("bertology_batch_budget_tokens", "Tokens that a batch may hold now", registry=self.registry)
        budget.set_function(lambda: queue.times.budget)
        # by these names the endpoint pickers of Kubernetes' Gateway API tell a busy server from an idle one
        waiting = Gauge("vllm:num_requests_waiting", "Items waiting", registry=self.registry)
        running = Gauge("vllm:num_requests_running", "Items in the batch that runs", registry=self.registry)
        used = Gauge("vllm:kv_cache_usage_perc", "Share of the room for waiting tokens in use", registry=self.registry)
        waiting.set_function(lambda: queue.items)
        running.set_function(lambda: queue.running)
        used.set_function(lambda: queue.tokens / queue.max_tokens)

    def batch(self, items: Sequence[CallItem], seconds: float) -> None:
        self._batch.observe(seconds)
        self._batch_tokens.observe(sum(item.charged for item in items))
        self._shared.inc(sum(item.spared[0] for item in items))
        self._batch_items.observe(len(items))
        self._batch_deltas.observe(len({item.delta for item in items}))
        self.statistics.batch(items, seconds, time.monotonic())

    def finished(self, items: Sequence[CallItem], outcome: str, now: float) -> None:
        """Notes what became of queued items; ``now`` is the time of the queue's clock."""
        if self.tracing:
            self.tracing.items(items, outcome, now)
        if outcome in (ANSWERED, FAILED):
            self.statistics.finished(items, outcome == ANSWERED, now)
        for item in items:
            name = self._label(item.delta)
            self._child(self._items, (name, outcome)).inc()
            if outcome == ANSWERED:
                for result, texts in (("hit", item.known), ("miss", item.unknown)) if item.beside else ():
                    self._child(self._label_rows, (name, result)).inc(len(texts))
                self._child(self._tokens, (name,)).inc(item.cost)
                self._child(self._latency, (name,)).observe(now - item.arrived)

    def refused(self, items: Mapping[str, int]) -> None:
        for delta, count in items.items():
            self._child(self._items, (self._label(delta), REFUSED)).inc(count)

    def shadow(self, delta: str, version: str, outcome: str) -> None:
        """Notes whether a shadow decided as the version that answered."""
        self._child(self._shadows, (self._label(delta), version, outcome)).inc()

    def call(self, status: int) -> None:
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
        self._deltas.set(count)

    def affinity(self, resident: Callable[[], Iterable[str]], waiting: Callable[[], Iterable[str]], slots: int) -> None:
        """Shows which deltas are here, in the gauge that Kubernetes' endpoint pickers route by."""
        self.registry.register(Affinity(resident, waiting, slots))

    def render(self) -> bytes:
        return generate_latest(self.registry)


TICK = 0.05  # seconds


class Health(Collector):
    """As it is at the time of the scrape."""

    def __init__(self, is_ready: Callable[[], bool], pipeline: DeltaSet, background: Background) -> None:
        self._is_ready, self._pipeline, self._background = is_ready, pipeline, background

    def describe(self) -> Iterator[Metric]:
        """Nothing: there may be no executor yet."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Readiness, how the executor does, and what else runs."""
        pipeline = self._pipeline
        yield GaugeMetricFamily("bertology_ready", "1 while readiness answers 200", value=self._is_ready())
        yield GaugeMetricFamily("bertology_executor_up", "1 while batches can run", value=pipeline.is_up)
        yield CounterMetricFamily(
            "bertology_executor_restarts", "Executors that had to be replaced", value=pipeline.restarts
        )
        up = GaugeMetricFamily("bertology_background_up", "1 while background work runs", labels=("work",))
        faults = CounterMetricFamily(
            "bertology_background_faults", "Errors that ended background work, which begins again", labels=("work",)
        )
        for name, state in list(self._background.works.items()):
            up.add_metric((name,), state.up)
            faults.add_metric((name,), state.faults)
        yield from (up, faults)


class LoopLag:
    """Watches how late the event loop is: how long something held it, so that nothing else was answered meanwhile."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "bertology_event_loop_lag_seconds", "How late the event loop ran what was due, looked at every 50 ms",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5), registry=registry,
        )  # fmt: skip
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + TICK
        self._timer = loop.call_at(due, self._tick, loop, due)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._seconds.observe(max(0.0, loop.time() - due))
        self.start(loop)


NAME = "vllm:lora_requests_info"
LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
MOST_NAMED = 1000


class Affinity(Collector):
    """``resident()`` and ``waiting()`` are asked at every scrape; ``slots`` is how many deltas fit."""

    def __init__(self, resident: Callable[[], Iterable[str]], waiting: Callable[[], Iterable[str]], slots: int) -> None:
        self._resident, self._waiting, self._slots = resident, waiting, slots

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(NAME, "Deltas loaded and waited for", labels=LABELS)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for family in self.describe():
            family.add_metric((str(self._slots), _joined(self._resident()), _joined(self._waiting())), time.time())
            yield family


def _joined(names: Iterable[str]) -> str:
    return ",".join(sorted(names)[:MOST_NAMED])
