"""Figure 8: five times more calls than it can answer: it answers as many as ever, and refuses the rest at once."""

from __future__ import annotations

import asyncio
import random

from bertology_serve.serving.prove.figure import Measured
from bertology_serve.serving.prove.stage import WORDS, Stage
from bertology_serve.serving.prove.traffic import closed, opened, percentile, predict

GOODPUT, REFUSAL = 0.9, 0.005
TIMES = 5
CLIENTS = 32


def measure(stage: Stage) -> Measured:
    """Peak: a closed loop of clients. Overload: Poisson arrivals at five times that rate."""
    seconds = stage.seconds(6.0, 30.0)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=30)) for _ in range(8)]
    ask = predict("mood", texts)
    limits = ("--max-queue-tokens", "8192", "--max-delta-tokens", "8192")
    with stage.server(stage.zoo, *limits) as served:

        async def run() -> tuple[float, float, list[float], int]:
            await closed(served.url, lambda: ask, CLIENTS, 1.0)
            peak = len((await closed(served.url, lambda: ask, CLIENTS, seconds)).answered) / seconds
            over = await opened(served.url, lambda: ask, TIMES * peak, seconds, most=512)
            return peak, len(over.answered) / seconds, over.refused, over.unexplained + over.broken

        peak, good, refused, unexplained = asyncio.run(run())
    middle, p99 = percentile(refused, 0.5), percentile(refused, 0.99)
    words = (
        f"goodput {100 * good / peak:.0f} % of {peak:.0f} calls/s; {len(refused):,} refusals in {1e3 * middle:.1f} ms "
        f"(median; p99 {1e3 * p99:.1f} ms, client included), {unexplained} without Retry-After"
    )
    holds = good >= GOODPUT * peak and middle <= REFUSAL and not unexplained
    return Measured(words, holds, {"peak": peak, "goodput": good, "refusal_ms": 1e3 * middle, "p99_ms": 1e3 * p99})
