"""Whether the server is well, as Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bertology_serve.encoder.residents import Residents


class Vitals(Collector):
    """As it is at the time of the scrape."""

    def __init__(self, is_ready: Callable[[], bool], pipeline: Residents) -> None:
        self._is_ready, self._pipeline = is_ready, pipeline

    def describe(self) -> Iterator[Metric]:
        """Nothing: there may be no executor yet."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Readiness, and how the executor does."""
        pipeline = self._pipeline
        yield GaugeMetricFamily("bertology_ready", "1 while readiness answers 200", value=self._is_ready())
        yield GaugeMetricFamily("bertology_executor_up", "1 while batches can run", value=pipeline.is_up)
        yield CounterMetricFamily(
            "bertology_executor_restarts", "Executors that had to be replaced", value=pipeline.restarts
        )
