"""Figure 7: SIGTERM turns readiness off at once, and loses nothing that was accepted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import msgspec

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import HEADERS, Served, Stage
from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes

BOUND = 0.1
CLIENTS = 8
READY = request_bytes("GET", "/v2/health/ready")


def measure(stage: Stage) -> Measured:
    """Clients that never stop asking while the server is told to; five times, or once."""
    waits: list[float] = []
    outcomes: Counter[str] = Counter()
    for _ in range(stage.count(1, 5)):
        with stage.server(stage.zoo, "--drain-seconds", "1") as served:
            wait, found = asyncio.run(_run(served))
        waits.append(wait)
        outcomes += found
    words = f"not ready after {1e3 * max(waits):.0f} ms; {outcomes['answered']} answered, {outcomes['lost']} lost"
    holds = max(waits) <= BOUND and not outcomes["lost"] and outcomes["answered"] > 0
    return Measured(words, holds, {"not_ready_ms": [1e3 * wait for wait in waits], **outcomes})


async def _run(served: Served) -> tuple[float, Counter[str]]:
    outcomes: Counter[str] = Counter()
    clients = [asyncio.create_task(_ask(served.url, outcomes)) for _ in range(CLIENTS)]
    await asyncio.sleep(1)
    async with Wire(served.url) as wire:
        assert (await wire.send(READY)).status == 200
        started = time.perf_counter()
        served.terminate()
        while (await wire.send(READY)).status == 200:
            await asyncio.sleep(0.002)
        wait = time.perf_counter() - started
    await asyncio.wait_for(asyncio.gather(*clients), 60)
    return wait, outcomes


async def _ask(url: str, outcomes: Counter[str]) -> None:
    """Asks until nobody listens any more. What breaks after it was sent was accepted, and is lost."""
    items = [{"delta": name, "text": "the river bank was very cold"} for name in ("mood", "sense")]
    ask = request_bytes("POST", "/predict", msgspec.json.encode(items), HEADERS)
    while True:
        try:
            async with Wire(url) as wire:  # a new connection each time: one that rests may be closed by the server
                reply = await wire.send(ask)
        except ConnectionError:
            return
        except Broken:
            outcomes["lost"] += 1
            return
        outcomes["answered" if reply.status == 200 else f"status {reply.status}"] += 1
