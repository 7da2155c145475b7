"""Figure 10: the executor is killed under load, and nobody hears of it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from statistics import median

import msgspec

from bertology_serve.bench.prove.cores import descendants
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.isolation import apart, numbers_of
from bertology_serve.bench.prove.stage import HEADERS, WORDS, ZOO, Served, Stage
from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.serving.versions.delta_registry import Registry

BOUND = 5.0
CLIENTS, CALLS, ITEMS = 8, 16, 4
REST, LONGEST, LOOK = 0.5, 60.0, 0.005  # seconds: between two kills; given up; between two looks
READY = request_bytes("GET", "/v2/health/ready")
Call = tuple[bytes, list[list[float]]]  # what is sent, and the numbers of its answers


def measure(stage: Stage) -> Measured:
    """SIGKILL again and again while clients ask; every call must have its own answer."""
    kills = stage.count(5, 20)
    calls = _calls(stage)
    with stage.server(stage.zoo, "--executor", "process") as served:
        waits, found = asyncio.run(_run(served, calls, kills))
    bad = {name: found[name] for name in ("refused", "lost", "wrong")}
    words = f"{len(waits)} kills: ready after {median(waits):.2f} s, at most {max(waits):.2f}; "
    words += ", ".join(f"{found[name]:,} {name}" for name in ("answered", *bad))
    holds = max(waits) < BOUND and not any(bad.values()) and found["answered"] > 0
    return Measured(words, holds, {"ready_seconds": waits, **found})


def executor_of(served: Served) -> int:
    """The process that runs a server's batches: the fork server's child."""
    return descendants(served.process.pid)[-1]


def _calls(stage: Stage) -> list[Call]:
    """Calls of a few items each, of all deltas, with the answers that they have without any fault."""
    registry, draw = Registry(Pipeline(stage.encoder)), random.Random(0)
    registry.load(stage.zoo)
    found = []
    for _ in range(CALLS):
        asked = [(draw.choice(list(ZOO)), " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))) for _ in range(ITEMS)]
        jobs = [registry.pipeline.prepare(Request(name, {"text": text}, logits=True)) for name, text in asked]
        body = msgspec.json.encode([{"delta": name, "text": text, "logits": True} for name, text in asked])
        numbers = [numbers_of(prediction.answer) for prediction in registry.pipeline.run(jobs)]
        found.append((request_bytes("POST", "/predict", body, HEADERS), numbers))
    return found


async def _run(served: Served, calls: list[Call], kills: int) -> tuple[list[float], Counter[str]]:
    """Seconds until the server was ready again after each kill, and what became of the calls."""
    found, done = Counter[str](), asyncio.Event()
    clients = [asyncio.create_task(_ask(served.url, calls, seed, found, done)) for seed in range(CLIENTS)]
    waits = []
    async with Wire(served.url) as wire:
        for _ in range(kills):
            await asyncio.sleep(REST)
            pid, started = await asyncio.to_thread(executor_of, served), time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            for status in (503, 200):
                while (await wire.send(READY)).status != status and time.perf_counter() - started < LONGEST:
                    await asyncio.sleep(LOOK)
            waits.append(time.perf_counter() - started)
    await asyncio.sleep(REST)
    done.set()
    await asyncio.wait_for(asyncio.gather(*clients), LONGEST)
    return waits, found


async def _ask(url: str, calls: list[Call], seed: int, found: Counter[str], done: asyncio.Event) -> None:
    """Asks until it is over, and compares."""
    draw = random.Random(seed)
    async with Wire(url) as wire:
        while not done.is_set():
            ask, expected = draw.choice(calls)
            try:
                reply = await wire.send(ask)
            except (Broken, ConnectionError):
                found["lost"] += 1
                continue
            found[_judged(reply.status, reply.body, expected)] += 1


def _judged(status: int, body: bytes, expected: list[list[float]]) -> str:
    if status != 200:
        return "refused"
    answers = [numbers_of(answer) for answer in msgspec.json.decode(body)]
    right = len(answers) == len(expected) and all(map(lambda a, b: apart(a, b) < 1e-4, answers, expected))
    return "answered" if right else "wrong"
