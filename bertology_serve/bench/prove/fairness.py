"""Figure 4: one flooder delays twenty light deltas by little more than one batch."""

from __future__ import annotations

import asyncio
import random
from statistics import median

from bertology_serve.bench.prove.cores import ONE_THREAD, apart
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import Stage
from bertology_serve.bench.prove.traffic import Outcomes, closed, distinct, opened, percentile, predict

LIGHT = 20
CAP = 0.025  # seconds that a batch may take
RATE = 30.0  # of all light deltas together
FLOOD = 16  # clients of the flooder, eight texts a call


def measure(stage: Stage) -> Measured:
    """The light deltas alone, and beside a flooder that never waits, in turns."""
    seconds = stage.seconds(6.0, 15.0)
    root = stage.directory / "fair"
    for number in range(LIGHT):
        stage.save(root, f"light-{number}", "1", number, "mood")
    stage.save(root, "flood", "1", 99, "mood")
    limits = ("--max-batch-ms", str(1e3 * CAP))
    with stage.server(root, *limits, environ=ONE_THREAD) as served, apart(served.pid) as pinned:
        rounds = asyncio.run(_run(served.url, stage.rounds, seconds))
    alone = [percentile(one.answered, 0.99) for one, _, _ in rounds]
    beside = [percentile(one.answered, 0.99) for _, one, _ in rounds]
    more = median(after - before for after, before in zip(beside, alone, strict=True))
    refused = sum(len(one.refused) + one.broken for _, one, _ in rounds)
    flooded = sum(len(one.answered) for _, _, one in rounds)
    words = (
        f"p99 {1e3 * median(beside):.1f} ms beside, {1e3 * median(alone):.1f} ms alone ({1e3 * more:+.1f} ms); "
        f"{flooded} calls of the flooder answered"
    )
    facts = {"p99_ms": [1e3 * one for one in beside], "alone_p99_ms": [1e3 * one for one in alone],
             "refused": refused, "pinned": pinned}  # fmt: skip
    return Measured(words, more <= 1.5 * CAP and not refused and flooded > 0, facts)


async def _run(url: str, rounds: int, seconds: float) -> list[tuple[Outcomes, Outcomes, Outcomes]]:
    draw = random.Random(0)
    flood = distinct(draw, "flood")

    def light() -> bytes:
        return predict(f"light-{draw.randrange(LIGHT)}", "the river bank was very cold")

    await opened(url, light, RATE, 1.0)
    found = []
    for turn in range(rounds):
        alone = await opened(url, light, RATE, seconds, turn)
        flooder = asyncio.create_task(closed(url, flood, FLOOD, seconds))
        beside = await opened(url, light, RATE, seconds, turn)
        found.append((alone, beside, await flooder))
    return found
