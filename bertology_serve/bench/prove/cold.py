"""Figure 3: cold deltas load while hot ones answer as before."""

from __future__ import annotations

import asyncio
import itertools
import random
from statistics import median

from bertology_serve.bench.prove.cores import ONE_THREAD, apart
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import ZOO, Stage
from bertology_serve.bench.prove.traffic import Outcomes, distinct, opened, percentile, predict

BOUND = 1.25
COLD, POOL = 50, 20
TEXT = "the river bank was very cold"
RATE = 40.0


def measure(stage: Stage) -> Measured:
    """Quiet and loading rounds take turns. In a loading round some fifty calls of cold deltas come at random times;
    each loads from disk, for the device holds less than half of them.

    The ratio is the median over the rounds of the ratio of their 99th percentiles.
    """
    rounds, seconds = max(stage.rounds, stage.count(3, 5)), stage.seconds(4.0, 10.0)
    root = stage.directory / "cold"
    for number in range(COLD):
        stage.save(root, f"cold-{number}", "1", number, "mood")
    stage.save(root, "a-hot", "1", 99, "mood")
    size = stage.random("x", *ZOO["mood"], 0).bytes
    room = max(1, size * POOL // 2**20)
    limits = ("--device-mb", str(room), "--host-mb", "0")
    with stage.server(root, *limits, environ=ONE_THREAD) as served, apart(served.pid) as pinned:
        quiet, busy, loaded = asyncio.run(_run(served.url, rounds, seconds))
    ratios = [percentile(b.answered, 0.99) / percentile(q.answered, 0.99) for q, b in zip(quiet, busy, strict=True)]
    facts = {
        "ratios": ratios,
        "quiet_p99_ms": [1e3 * percentile(one.answered, 0.99) for one in quiet],
        "loading_p99_ms": [1e3 * percentile(one.answered, 0.99) for one in busy],
        "loaded": loaded,
        "pinned": pinned,
    }
    words = f"{median(ratios):.2f} × quiet ({len(ratios)} rounds, {loaded} loads)"
    return Measured(words, median(ratios) <= BOUND and loaded > 0, facts)


async def _run(url: str, rounds: int, seconds: float) -> tuple[list[Outcomes], list[Outcomes], int]:
    hot = distinct(random.Random(0), "a-hot", texts=1)
    quiet, busy, loads = [], [], 0
    names = itertools.cycle(range(COLD))
    await opened(url, hot, RATE, 1.0)
    for turn in range(rounds):
        quiet.append(await opened(url, hot, RATE, seconds, turn))
        calls = opened(url, lambda: predict(f"cold-{next(names)}", TEXT), COLD / seconds, seconds, turn + rounds)
        cold = asyncio.create_task(calls)
        busy.append(await opened(url, hot, RATE, seconds, turn))
        loads += len((await cold).answered)
    return quiet, busy, loads
