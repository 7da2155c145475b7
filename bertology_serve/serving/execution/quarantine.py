"""Deltas set aside: those whose batches ended the executor twice running."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable

from bertology_serve.encoder.pipeline import LoadedDelta
from bertology_serve.errors import Crashed

log = logging.getLogger(__name__)
FIRST, LONGEST = 10.0, 600.0  # seconds; each time twice as long as the time before


class Quarantine:
    """One version of a delta is set aside at a time; loading it again, or another, ends that."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: weakref.WeakKeyDictionary[LoadedDelta, tuple[float, float]] = weakref.WeakKeyDictionary()

    def put(self, ready: LoadedDelta) -> Crashed:
        """Sets a delta aside; what its callers are told."""
        _, before = self._until.get(ready, (0.0, FIRST / 2))
        seconds = min(2 * before, LONGEST)
        self._until[ready] = (self._clock() + seconds, seconds)
        log.error("delta %s, version %s, is set aside for %g s: the executor ended on it twice",
                  ready.delta.name, ready.delta.version, seconds)  # fmt: skip
        return self._told(ready, seconds)

    def refusal(self, ready: LoadedDelta) -> Crashed | None:
        """What a caller is told where the delta is set aside now."""
        if not self._until:
            return None
        left = self._until.get(ready, (0.0, 0.0))[0] - self._clock()
        return self._told(ready, left) if left > 0 else None

    def _told(self, ready: LoadedDelta, seconds: float) -> Crashed:
        return Crashed(
            f"the executor ended twice on delta {ready.delta.name!r}, version {ready.delta.version!r}; "
            f"it is set aside for {math.ceil(seconds)} s: try then, or load another version",
            retry_after=seconds,
        )
