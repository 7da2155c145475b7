"""Times batches of growing size, so that the server knows what it can do before the first call comes."""

from __future__ import annotations

import time
from collections.abc import Callable

from bertology_serve.encoder.pipeline import BASE, Job, Request
from bertology_serve.encoder.residents import Residents
from bertology_serve.serving.times import WHOLE, Rung
from bertology_serve.serving.work import squares_of

SENTENCE = "a sentence of some twenty words or so, as people send them to a server that reads what they mean"
LONG = " ".join([SENTENCE] * 16)
FIRST, REPEATS = 32, 3


def climb(pipeline: Residents, cap: float, most: int, clock: Callable[[], float] = time.perf_counter) -> list[Rung]:
    """(tokens, Σlen², seconds) of batches of about 32 tokens, 64, 128 ... up to ``most``, or until one takes twice
    ``cap`` and five times as long as the first, which is mostly the fixed part of a batch (``times.WHOLE``): of short
    sentences, then of a text as long as the encoder's base reads.
    """
    rungs: list[Rung] = []
    for text in (SENTENCE, LONG):
        job, last = pipeline.prepare(Request(BASE, {"text": text})), 0.0
        size = FIRST if text == SENTENCE else job.cost
        while size <= max(most, FIRST) and last <= max(2 * cap, WHOLE * (rungs[0][2] if rungs else 0.0)):
            jobs = [job] * max(1, round(size / job.cost))
            last = _timed(pipeline, jobs, clock)
            rungs.append((job.cost * len(jobs), squares_of(job) * len(jobs), last))
            size *= 2
    return rungs


def _timed(pipeline: Residents, jobs: list[Job], clock: Callable[[], float]) -> float:
    """The least seconds of a batch: what else the machine does only adds to them."""
    seconds = []
    for _ in range(REPEATS):
        start = clock()
        pipeline.run(jobs)
        seconds.append(clock() - start)
    return min(seconds)
