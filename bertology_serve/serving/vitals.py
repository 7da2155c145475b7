"""Whether the server is well, as Prometheus is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bertology_serve.encoder.residents import Residents
from bertology_serve.serving.background import Background

TICK = 0.05  # seconds


class Vitals(Collector):
    """As it is at the time of the scrape."""

    def __init__(self, is_ready: Callable[[], bool], pipeline: Residents, background: Background) -> None:
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
        """Looks from now on."""
        due = loop.time() + TICK
        self._timer = loop.call_at(due, self._tick, loop, due)

    def stop(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._seconds.observe(max(0.0, loop.time() - due))
        self.start(loop)
