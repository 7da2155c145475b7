"""What a router counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bertology_serve.scale.placement import Placement, ReplicaState

MOST_RESIDENT = 100_000  # deltas that a replica is thought to hold


class RouterMetrics(Collector):
    """What the router counts, and what it knows of its replicas when it is asked."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self.registry = own = CollectorRegistry()
        self._calls = Counter("bertology_router_calls", "Calls by replica, status", ("replica", "status"), registry=own)
        self._again = Counter("bertology_router_retries", "Calls sent to another replica", ("reason",), registry=own)
        self._met = Counter(
            "bertology_router_resident",
            "Calls sent where their delta was (hit) or not",
            ("result",),
            registry=own,
        )
        self._children: dict[tuple[str, int], Counter] = {}
        self._hit, self._miss = self._met.labels("hit"), self._met.labels("miss")
        own.register(self)

    def call(self, replica: str, status: int) -> None:
        """Notes the answer of a replica, or, without a name, of the router itself."""
        child = self._children.get((replica, status))
        if child is None:
            child = self._children[replica, status] = self._calls.labels(replica or "router", str(status))
        child.inc()

    def again(self, reason: str) -> None:
        """Notes that a call goes to another replica."""
        self._again.labels(reason).inc()

    def met(self, state: ReplicaState, delta: str | None) -> None:
        """Notes whether a replica that a call is sent to has its delta in memory; it soon will."""
        if delta is None:
            return
        (self._hit if delta in state.resident else self._miss).inc()
        if len(state.resident) < MOST_RESIDENT:
            state.resident.add(delta)

    def describe(self) -> Iterator[Metric]:
        """Nothing before it runs."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Each replica's readiness and load, and the deltas that have several replicas."""
        placement = self._placement
        ready = GaugeMetricFamily("bertology_router_ready", "1 while a replica gets calls", labels=("replica",))
        load = GaugeMetricFamily("bertology_router_tokens", "Tokens, about, of calls under way", labels=("replica",))
        spread = GaugeMetricFamily("bertology_router_delta_replicas", "Deltas with several replicas", labels=("delta",))
        for name, state in placement.replicas.items():
            ready.add_metric((name,), state.ready)
            load.add_metric((name,), state.load)
        for delta, count in list(placement.spread().items())[:200]:
            spread.add_metric((delta,), count)
        yield from (ready, load, spread)
