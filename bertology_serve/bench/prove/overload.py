"""Figure 8: five times more calls than it can answer: it answers as many as ever, and refuses the rest at once."""

from __future__ import annotations

import asyncio
import random
from statistics import median

from bertology_serve.bench.prove.cores import ONE_THREAD, apart
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import Stage
from bertology_serve.bench.prove.traffic import Outcomes, closed, distinct, opened, percentile

GOODPUT, REFUSAL = 0.9, 0.005
TIMES = 5
CLIENTS = 32


def measure(stage: Stage) -> Measured:
    """Peak: a closed loop of clients. Overload: Poisson arrivals at five times that rate. They take turns."""
    seconds = stage.seconds(4.0, 15.0)
    ask = distinct(random.Random(0), "mood")
    limits = ("--max-queue-tokens", "8192", "--max-delta-tokens", "8192")
    shares, peaks, found = list[float](), list[float](), Outcomes()
    with stage.server(stage.zoo, *limits, environ=ONE_THREAD) as served, apart(served.pid) as pinned:
        asyncio.run(closed(served.url, ask, CLIENTS, seconds / 5))
        for turn in range(stage.rounds):
            peak = asyncio.run(closed(served.url, ask, CLIENTS, seconds)).count / seconds
            over = asyncio.run(opened(served.url, ask, TIMES * peak, seconds, turn, most=512))
            peaks.append(peak)
            shares.append(len(over.answered) / seconds / peak)
            found.add(over)
    good, middle, p99 = median(shares), percentile(found.refused, 0.5), percentile(found.refused, 0.99)
    unexplained = found.unexplained + found.broken
    words = (
        f"goodput {100 * good:.0f} % of {median(peaks):.0f} calls/s; {len(found.refused):,} refusals in "
        f"{1e3 * middle:.1f} ms (median; p99 {1e3 * p99:.1f} ms, client included), {unexplained} without Retry-After"
    )
    holds = good >= GOODPUT and middle <= REFUSAL and not unexplained
    facts = {"peaks": peaks, "shares": shares, "refusal_ms": 1e3 * middle, "p99_ms": 1e3 * p99, "pinned": pinned}
    return Measured(words, holds, facts)
