"""Times batches of growing size, so that the server knows what it can do before the first call comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from bertology_serve.encoder.pipeline import BASE, Request, Residents

SENTENCE = "a sentence of some twenty words or so, as people send them to a server that reads what they mean"
FIRST, REPEATS = 32, 3


def climb(
    pipeline: Residents, cap: float, most: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[int, float]]:
    """(tokens, seconds) of batches of about 32 tokens, 64, 128 ... up to ``most``, or until one takes twice ``cap``."""
    job = pipeline.prepare(Request(BASE, {"text": SENTENCE}))
    rungs: list[tuple[int, float]] = []
    size = FIRST
    while size <= max(most, FIRST):
        jobs = [job] * max(1, round(size / job.cost))
        seconds = []
        for _ in range(REPEATS):
            start = clock()
            pipeline.run(jobs)
            seconds.append(clock() - start)
        rungs.append((job.cost * len(jobs), median(seconds)))
        if rungs[-1][1] > 2 * cap:
            break
        size *= 2
    return rungs
