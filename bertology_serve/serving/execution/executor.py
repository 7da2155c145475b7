"""The threads that run batches, and the deltas that they set aside because they ended an executor twice running."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bertology_serve.encoder.pipeline import Job, LoadedDelta, Prediction
from bertology_serve.errors import BertologyError, Crashed
from bertology_serve.serving.batching.queue import WorkQueue
from bertology_serve.serving.batching.scheduler import CallItem, Outcome
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.logs import place_of

log = logging.getLogger(__name__)
FIRST, LONGEST = 10.0, 600.0  # seconds; each time twice as long as the time before


class Quarantine:
    """One version of a delta is set aside at a time; loading it again, or another, ends that."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: weakref.WeakKeyDictionary[LoadedDelta, tuple[float, float]] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._until)

    def put(self, ready: LoadedDelta) -> Crashed:
        _, before = self._until.get(ready, (0.0, FIRST / 2))
        seconds = min(2 * before, LONGEST)
        self._until[ready] = (self._clock() + seconds, seconds)
        log.error("delta %s, version %s, is set aside for %g s: the executor ended on it twice",
                  ready.delta.name, ready.delta.version, seconds)  # fmt: skip
        return self._told(ready, seconds)

    def refusal(self, ready: LoadedDelta) -> Crashed | None:
        """What a caller is told where the delta is set aside now."""
        left = self._until.get(ready, (0.0, 0.0))[0] - self._clock()
        return self._told(ready, left) if left > 0 else None

    def _told(self, ready: LoadedDelta, seconds: float) -> Crashed:
        return Crashed(
            f"the executor ended twice on delta {ready.delta.name!r}, version {ready.delta.version!r}; "
            f"it is set aside for {math.ceil(seconds)} s: try then, or load another version",
            retry_after=seconds,
        )


THREAD = "executor"
Run = Callable[[Sequence[Job]], list[Prediction]]
Deliver = Callable[[Sequence[CallItem], Sequence[Outcome]], None]
Observe = Callable[[Sequence[CallItem], float], None]


class Executor:
    """Takes batches from the queue, runs them, and delivers an outcome for every item; ``parallel`` at the same time.

    ``run`` answers the jobs of one batch; when it raises, each job is run by itself, so that one bad job spoils no
    other; when it raises Crashed, each delta is run by itself once more, and set aside where it crashes again.
    ``deliver`` and ``observe(batch, seconds)`` are called in the batch's thread. Whatever raises in it, the batch in
    hand is delivered and ``background`` begins it again.
    """

    def __init__(
        self,
        queue: WorkQueue,
        run: Run,
        deliver: Deliver,
        observe: Observe,
        background: Background | None = None,
        parallel: int = 1,
    ) -> None:
        self._queue, self._run, self._deliver, self._observe = queue, run, deliver, observe
        queue.takers = parallel
        self.quarantine = Quarantine()
        self._background = background or Background()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        names = [THREAD, *(f"{THREAD} {number}" for number in range(2, self._queue.takers + 1))]
        self._threads = [self._background.thread(name, self._loop, vital=True) for name in names]

    def stop(self, timeout: float) -> bool:
        """Closes the queue and waits for what is in it, at most ``timeout`` seconds; whether all was answered."""
        self._queue.close()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _loop(self) -> None:
        _name_thread()
        while self._serve(self._queue.take()):
            pass

    def _serve(self, batch: Sequence[CallItem]) -> bool:
        """Runs one batch, of which nothing is held while the next is waited for; false for the end, which is empty."""
        if not batch:
            return False
        start, now = time.perf_counter(), time.monotonic()
        for item in batch:
            item.started = now
        outcomes: Sequence[Outcome] = [RuntimeError("the executor's thread failed; try again")] * len(batch)
        try:
            outcomes = self._judged(batch)
            seconds = time.perf_counter() - start
            self._queue.served(batch, seconds)
        finally:
            self._deliver(batch, outcomes)
        self._observe(batch, seconds)
        return True

    def _judged(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """The outcomes; deltas that are set aside cost no batch."""
        if not self.quarantine:
            return self._outcomes(jobs)
        refusals = [self.quarantine.refusal(job.ready) for job in jobs]
        left = [job for job, refusal in zip(jobs, refusals, strict=True) if refusal is None]
        run = iter(self._outcomes(left) if left else ())
        return [next(run) if refusal is None else refusal for refusal in refusals]

    def _outcomes(self, jobs: Sequence[Job], again: bool = False) -> Sequence[Outcome]:
        try:
            outcomes = self._run(jobs)
            if len(outcomes) != len(jobs):
                raise RuntimeError(f"{len(outcomes)} answers to {len(jobs)} jobs")
            return outcomes
        except Crashed:
            if again:
                return [self.quarantine.put(jobs[0].ready)] * len(jobs)
            return self._once_more(jobs)
        except Exception as problem:
            if not isinstance(problem, BertologyError):
                log.error("a batch of %d raised %s", len(jobs), place_of(problem))
            if len(jobs) == 1:
                return [problem.with_traceback(None)]  # it would hold its jobs, and they hold their deltas
        return [self._outcomes([job], again)[0] for job in jobs]

    def _once_more(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        """What the executor ended on runs once more, each delta by itself: so it shows which of them it was."""
        found: dict[int, Outcome] = {}
        for ready in dict.fromkeys(job.ready for job in jobs):
            own = [i for i, job in enumerate(jobs) if job.ready is ready]
            found |= zip(own, self._outcomes([jobs[i] for i in own], again=True), strict=True)
        return [found[i] for i in range(len(jobs))]


def _name_thread() -> None:
    """Tells the system the thread's name, so that ``top -H`` shows it; Python does so from 3.14 on."""
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(THREAD, encoding="ascii")
