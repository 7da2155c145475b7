"""Figure 1: whatever goes wrong, every call that waits gets one answer, its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bertology_serve.bench.prove.crashes import READY, executor_of
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.isolation import apart, numbers_of
from bertology_serve.bench.prove.stage import HEADERS, WORDS, ZOO, Served, Stage, serving
from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.serving.versions.delta_registry import Registry

CLIENTS, TEXTS = 16, 8
HANG_UP, BOUND = 0.05, 1e-4
BETWEEN_KILLS = 3.0  # seconds
ANSWERED, REFUSED = "answered", "refused"
Expected = dict[tuple[str, str], list[float]]


def measure(stage: Stage) -> Measured:
    """Batches and items that raise, cold deltas on a slow disk, torn versions, swaps to them, an executor that is
    killed, clients that hang up.
    """
    calls = stage.count(1500, 20_000)
    root = stage.directory / "faults"
    if not root.exists():
        shutil.copytree(stage.zoo, root)
    expected = _expected(stage, root)
    command = [sys.executable, "-m", "bertology_serve.bench.prove.faulty", stage.backbone, str(root)]
    with serving(command, {}) as served:
        found = asyncio.run(_run(served, calls, expected, root))
        stage.served_cpu += served.cpu
    finals = found[ANSWERED] + found[REFUSED] + found["hung up"]
    bad = {name: found[name] for name in ("lost", "swapped", "wrong", "unexplained")}
    words = (
        f"{calls:,} calls: {found[ANSWERED]:,} answered, {found[REFUSED]} told of a fault, {found['hung up']} hung up, "
        f"{found['kills']} kills; " + ", ".join(f"{count} {name}" for name, count in bad.items())
    )
    return Measured(words, finals == calls and not any(bad.values()), dict(found))


def _expected(stage: Stage, root: Path) -> Expected:
    """Every delta's own answer to every text."""
    registry, draw = Registry(Pipeline(stage.encoder)), random.Random(0)
    registry.load(root)
    pipeline, found = registry.pipeline, {}
    for name in ZOO:
        for _ in range(TEXTS):
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))
            job = pipeline.prepare(Request(name, {"text": text}, logits=True))
            found[name, text] = numbers_of(pipeline.run([job])[0].answer)
    return found


async def _run(served: Served, calls: int, expected: Expected, root: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    numbers, done = iter(range(calls)), asyncio.Event()
    vandal = asyncio.create_task(_vandal(served.url, root, done))
    assassin = asyncio.create_task(_assassin(served, found))
    await asyncio.gather(*(_client(served.url, numbers, expected, found) for _ in range(CLIENTS)))
    done.set()
    assassin.cancel()
    await vandal
    return found


async def _assassin(served: Served, found: Counter[str]) -> None:
    """Kills the executor some seconds after it has come up, until it is cancelled."""
    async with Wire(served.url) as wire:
        while True:
            await asyncio.sleep(BETWEEN_KILLS)
            if (await wire.send(READY)).status == 200:
                os.kill(await asyncio.to_thread(executor_of, served), signal.SIGKILL)
                found["kills"] += 1


async def _client(url: str, numbers: Iterator[int], expected: Expected, found: Counter[str]) -> None:
    """Sends calls with ids of their own; hangs up on some of them."""
    keys = list(expected)
    async with Wire(url) as wire:
        for number in numbers:
            draw = random.Random(number)
            name, text = draw.choice(keys)
            item = {"delta": name, "text": text, "id": number, "logits": True}
            call = wire.send(request_bytes("POST", "/predict", msgspec.json.encode(item), HEADERS))
            if draw.random() < HANG_UP:
                task = asyncio.ensure_future(call)
                await asyncio.sleep(draw.random() * 0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                found["hung up"] += 1
                wire.close()
                continue
            try:
                reply = await call
            except (Broken, ConnectionError):
                found["lost"] += 1
                continue
            found[f"status {reply.status}"] += 1
            found[_judged(reply.status, msgspec.json.decode(reply.body), number, expected[name, text])] += 1


def _judged(status: int, body: dict[str, Any], number: int, expected: list[float]) -> str:
    """What a call's answer is: its own, a fault that was told, or what must not be."""
    if status != 200:
        return REFUSED if status in (429, 500, 503, 504) and "error" in body else "unexplained"
    if body.get("id") != number:
        return "swapped"
    return ANSWERED if apart(numbers_of(body), expected) <= BOUND else "wrong"


async def _vandal(url: str, root: Path, done: asyncio.Event) -> None:
    """Puts torn versions beside the good ones, asks for them, and takes them away."""
    async with Wire(url) as wire:
        for name in itertools.cycle(ZOO):
            if done.is_set():
                return
            torn = root / name / "2"
            await asyncio.to_thread(_tear, root / name / "1", torn)
            load = request_bytes(
                "POST", f"/v2/repository/models/{name}/load", b'{"parameters":{"version":"2"}}', HEADERS
            )
            reply = await wire.send(load)
            assert reply.status == 400, reply.body
            await asyncio.to_thread(shutil.rmtree, torn)
            await asyncio.sleep(0.05)


def _tear(good: Path, torn: Path) -> None:
    shutil.copytree(good, torn)
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
