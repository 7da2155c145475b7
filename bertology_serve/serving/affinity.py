"""The gauge by which Kubernetes' endpoint pickers send a call to a server that holds its adapter already.

Gateway API Inference Extension, proposal 003: ``vllm:lora_requests_info`` with labels ``max_lora`` (how many fit),
``running_lora_adapters`` (which are loaded) and ``waiting_lora_adapters`` (which calls wait for).
Its value is the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

NAME = "vllm:lora_requests_info"
LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
MOST_NAMED = 1000


class Affinity(Collector):
    """``resident()`` and ``waiting()`` are asked at every scrape; ``slots`` is how many deltas fit."""

    def __init__(self, resident: Callable[[], Iterable[str]], waiting: Callable[[], Iterable[str]], slots: int) -> None:
        self._resident, self._waiting, self._slots = resident, waiting, slots

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Its name and labels."""
        yield GaugeMetricFamily(NAME, "Deltas loaded and waited for", labels=LABELS)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One sample."""
        for family in self.describe():
            family.add_metric((str(self._slots), _joined(self._resident()), _joined(self._waiting())), time.time())
            yield family


def _joined(names: Iterable[str]) -> str:
    return ",".join(sorted(names)[:MOST_NAMED])
