"""``bench serving --calibration``: what one server takes for batches, calls and deltas, for ``plan`` to read."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import re
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import mean, median
from typing import NamedTuple

from bertology_serve.bench.prove.stage import HEADERS, WORDS, ZOO, Stage, serving
from bertology_serve.bench.prove.traffic import Ask, Outcomes, closed, predict
from bertology_serve.export.installation import environment
from bertology_serve.files import JsonObject
from bertology_serve.kinds.lora import Lora

LENGTHS, CLIENTS = (6, 22, 46), (1, 4, 16)  # words of a text; calls at a time
HOT, COLD = 6, 18  # deltas that stay; that take turns on what room is left
COUNTED = ("seconds_sum", "seconds_count", "tokens_sum", "items_sum")


class BatchSums(NamedTuple):
    """What a server's batches came to: seconds, how many there were, tokens, items."""

    seconds: float
    batches: float
    tokens: float
    items: float

    @property
    def sample(self) -> tuple[float, float, float]:
        """Tokens, Σlen² and seconds of the batch in the middle; texts are all equally long."""
        return self.tokens / self.batches, self.tokens**2 / self.items / self.batches, self.seconds / self.batches


def batches(url: str) -> BatchSums:
    """Since the server started."""
    request = urllib.request.Request(f"{url}/metrics", headers=HEADERS)
    page = urllib.request.urlopen(request, timeout=60).read().decode()
    found = [re.search(rf"^bertology_batch_{name} (\S+)", page, re.MULTILINE) for name in COUNTED]
    return BatchSums(*(float(one[1]) if one else 0.0 for one in found))


def calibrate(
    stage: Stage, seconds: float = 1.0, options: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> JsonObject:
    """Starts a server, with these options, and times it: so many seconds for each length and number of clients."""
    root, (spec, task) = stage.directory / "calibration", ZOO["mood"]
    for number in range(HOT + COLD):
        stage.save(root, f"d{number}", "1", number, "mood")
    one, two = (stage.random("x", Lora(rank=rank), task, 0).bytes for rank in (1, 2))
    room = math.ceil((HOT + 2) * stage.random("x", spec, task, 0).bytes / 2**20)
    with stage.server(root, "--device-mb", str(room), *options, environ=environ) as served:
        found = timed(served.url, seconds)
        if find_spec("aiohttp"):
            command = [sys.executable, "-m", "bertology_serve", "route", "--port", "0", "--replicas", served.url]
            with serving(command, {}) as router:
                found["route_seconds"] = asyncio.run(further(served.url, router.url, seconds))
    return {
        "backbone": stage.backbone,
        "environment": environment(),
        **found,
        "delta_bytes": 2 * one - two,
        "rank_bytes": two - one,
    }


def timed(url: str, seconds: float) -> JsonObject:
    """Times a server: batches of texts of several lengths, a call alone, deltas that are not resident."""
    ladder, around = list[tuple[float, float, float]](), list[float]()
    for words, clients in itertools.product(LENGTHS, CLIENTS):
        ask = asked(range(HOT), words)
        asyncio.run(closed(url, ask, clients, seconds / 4))
        before = batches(url)
        found = asyncio.run(closed(url, ask, clients, seconds))
        passed = BatchSums(*(now - then for now, then in zip(batches(url), before, strict=True)))
        ladder.append(passed.sample)
        if clients == 1:
            around.append(mean(found.answered) - passed.seconds / passed.batches)
    alone = min(sample[2] for sample in ladder)
    cold = asked(range(HOT, HOT + COLD), LENGTHS[0])
    first = asyncio.run(closed(url, cold, 1, 0)).answered
    while len(first) < COLD:  # each once, from the disk
        first += asyncio.run(closed(url, cold, 1, 0)).answered
    again = asyncio.run(closed(url, cold, 1, seconds)).answered
    call = max(0.0, median(around))
    return {
        "ladder": ladder,
        "call_seconds": call,
        "load_seconds": max(0.0, median(first) - alone - call),
        "lift_seconds": max(0.0, median(again) - alone - call),
    }


async def further(url: str, routed: str, seconds: float) -> float:
    """What a call takes longer on the second way; both are gone in turns."""
    ask, ends = asked(range(HOT), LENGTHS[0]), time.perf_counter() + seconds
    near, far = Outcomes(), Outcomes()
    while not far.answered or time.perf_counter() < ends:
        await closed(url, ask, 1, 0, near)
        await closed(routed, ask, 1, 0, far)
    return max(0.0, median(far.answered) - median(near.answered))


def asked(deltas: range, words: int) -> Ask:
    """Calls of one text, for one delta after the other."""
    draw, turns = random.Random(words), itertools.cycle(deltas)
    return lambda: predict(f"d{next(turns)}", " ".join(draw.choices(WORDS, k=words)))
