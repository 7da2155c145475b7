"""What Prometheus is told of the tiers."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bertology_serve.serving.tiers.tiers import Tiers


class TierGauges(Collector):
    """Counts at the time of the scrape."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    def describe(self) -> Iterator[Metric]:
        """Nothing: asking the tiers before they are filled would say little."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """How many deltas are where, and how they moved."""
        tiers = self._tiers
        where = GaugeMetricFamily("bertology_tier_deltas", "Registered deltas by tier", labels=("tier",))
        for tier, count in tiers.counts().items():
            where.add_metric((tier.value,), count)
        yield where
        yield GaugeMetricFamily("bertology_device_delta_bytes", "Bytes of resident deltas", value=tiers.device_bytes)
        for name, text, value in (
            ("loads", "Deltas read from disk", tiers.loads),
            ("load_failures", "Deltas that could not be loaded", tiers.failures),
            ("evictions", "Deltas that left the device for others", tiers.evictions),
            ("thrashes", "Deltas that came back soon after they had left", tiers.thrashed),
        ):
            yield CounterMetricFamily(f"bertology_delta_{name}", text, value=value)
