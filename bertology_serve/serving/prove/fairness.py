"""Figure 4: one flooder delays twenty light deltas by little more than one batch."""

from __future__ import annotations

import asyncio
import random

from bertology_serve.serving.prove.figure import Measured
from bertology_serve.serving.prove.stage import WORDS, Stage
from bertology_serve.serving.prove.traffic import Outcomes, closed, opened, percentile, predict

LIGHT = 20
CAP = 0.025  # seconds that a batch may take
RATE = 30.0  # of all light deltas together
FLOOD = 16  # clients of the flooder, eight texts a call


def measure(stage: Stage) -> Measured:
    """The light deltas alone, and beside a flooder that never waits."""
    seconds = stage.seconds(8.0, 30.0)
    root = stage.directory / "fair"
    for number in range(LIGHT):
        stage.save(root, f"light-{number}", "1", number, "mood")
    stage.save(root, "flood", "1", 99, "mood")
    with stage.server(root, "--max-batch-ms", str(1e3 * CAP)) as served:
        alone, beside, flooded = asyncio.run(_run(served.url, seconds))
    p99, own = percentile(beside.answered, 0.99), percentile(alone.answered, 0.99)
    words = (
        f"p99 {1e3 * p99:.1f} ms beside, {1e3 * own:.1f} ms alone (+{1e3 * (p99 - own):.1f} ms); "
        f"{len(flooded.answered)} calls of the flooder answered"
    )
    refused = len(beside.refused) + beside.broken
    holds = p99 <= own + 1.5 * CAP and not refused and len(flooded.answered) > 0
    return Measured(words, holds, {"p99_ms": 1e3 * p99, "alone_p99_ms": 1e3 * own, "refused": refused})


async def _run(url: str, seconds: float) -> tuple[Outcomes, Outcomes, Outcomes]:
    draw = random.Random(0)
    flood = predict("flood", [" ".join(draw.choices(WORDS, k=30)) for _ in range(8)])

    def light() -> bytes:
        return predict(f"light-{draw.randrange(LIGHT)}", "the river bank was very cold")

    await opened(url, light, RATE, 1.0)
    alone = await opened(url, light, RATE, seconds)
    flooder = asyncio.create_task(closed(url, lambda: flood, FLOOD, seconds))
    beside = await opened(url, light, RATE, seconds)
    return alone, beside, await flooder
