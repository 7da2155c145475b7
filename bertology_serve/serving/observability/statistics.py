"""What each version of a delta has done, as the Open Inference Protocol's statistics extension tells it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bertology_serve.deltas.delta import Delta
from bertology_serve.serving.batching.delta_queue import Work


@dataclass
class Duration:
    """How often, and how many seconds altogether."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Notes one more."""
        self.count += 1
        self.seconds += seconds

    def as_dict(self) -> dict[str, int]:
        """With nanoseconds, as the protocol has it."""
        return {"count": self.count, "ns": round(1e9 * self.seconds)}


class ModelStatistics:
    """One version's numbers. Times of a batch count whole for each of its items: they shared it."""

    def __init__(self) -> None:
        self.success, self.fail, self.queue, self.compute = Duration(), Duration(), Duration(), Duration()
        self.batches = 0
        self.last = 0.0

    def as_dict(self, name: str, version: str) -> dict[str, Any]:
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
        self._records: dict[tuple[str, str], ModelStatistics] = {}
        self._lock = threading.Lock()
        self._clock = clock

    def batch(self, works: Sequence[Work], seconds: float, now: float) -> None:
        """Notes a batch that took ``seconds`` and ended ``now``, on the clock by which the work arrived."""
        with self._lock:
            seen = set()
            for work in works:
                record = self._record(work)
                record.queue.add(max(0.0, now - seconds - work.arrived))
                record.compute.add(seconds)
                if id(record) not in seen:
                    record.batches += 1
                    seen.add(id(record))

    def finished(self, works: Iterable[Work], success: bool, now: float) -> None:
        """Notes items that were answered, or failed."""
        with self._lock:
            for work in works:
                record = self._record(work)
                (record.success if success else record.fail).add(max(0.0, now - work.arrived))
                record.last = self._clock()

    def of(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """``{"model_stats": [...]}`` of those deltas."""
        with self._lock:
            known = [(delta.name, delta.version) for delta in deltas]
            return {"model_stats": [self._records.get(key, ModelStatistics()).as_dict(*key) for key in known]}

    def keep(self, deltas: Iterable[Delta]) -> None:
        """Forgets all but those."""
        known = {(delta.name, delta.version) for delta in deltas}
        with self._lock:
            self._records = {key: record for key, record in self._records.items() if key in known}

    def _record(self, work: Work) -> ModelStatistics:
        key = work.delta, work.version
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = ModelStatistics()
        return record
