"""Figure 6: versions are swapped under load, and every answer is that of the version that it names."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.isolation import apart, flat
from bertology_serve.bench.prove.stage import HEADERS, Stage
from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.serving.versions.delta_registry import Registry

VERSIONS = {"1": "mood", "2": "grade", "3": "mood", "4": "topic"}
TEXT = "the river bank was very cold"
BOUND = 1e-4
CLIENTS = 4


def measure(stage: Stage) -> Measured:
    """Versions of three tasks and two kinds under one name."""
    swaps = stage.count(100, 500)
    root = stage.directory / "swaps"
    expected: dict[str, list[float]] = {}
    for seed, (version, like) in enumerate(VERSIONS.items()):
        stage.save(root, "it", version, seed, like)
        registry = Registry(Pipeline(stage.encoder), root)
        registry.put("it", version)
        job = registry.pipeline.prepare(Request("it", {"text": TEXT}, logits=True))
        expected[version] = flat(registry.pipeline.run([job])[0].answer["logits"])
    with stage.server(root) as served:
        answers, failures = asyncio.run(_run(served.url, swaps))
    wrong = sum(apart(flat(answer["logits"]), expected[answer["version"]]) > BOUND for answer in answers)
    seen = len({answer["version"] for answer in answers})
    words = f"{swaps} swaps, {len(answers):,} answers of {seen} versions: {failures} failures, {wrong} wrong"
    return Measured(words, not failures and not wrong and seen == len(VERSIONS), {"answers": len(answers)})


async def _run(url: str, swaps: int) -> tuple[list[dict[str, Any]], int]:
    """All answers, and how many calls failed."""
    body = msgspec.json.encode({"delta": "it", "text": TEXT, "logits": True})
    ask = request_bytes("POST", "/predict", body, HEADERS)
    answers: list[dict[str, Any]] = []
    failures, done = 0, asyncio.Event()

    async def client() -> None:
        nonlocal failures
        async with Wire(url) as wire:
            while not done.is_set():
                try:
                    reply = await wire.send(ask)
                except Broken:
                    failures += 1
                    continue
                if reply.status == 200:
                    answers.append(msgspec.json.decode(reply.body))
                else:
                    failures += 1

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    async with Wire(url) as wire:
        for swap in range(swaps):
            load = msgspec.json.encode({"parameters": {"version": list(VERSIONS)[swap % len(VERSIONS)]}})
            reply = await wire.send(request_bytes("POST", "/v2/repository/models/it/load", load, HEADERS))
            failures += reply.status != 200
            heard = len(answers) + failures
            while len(answers) + failures <= heard + CLIENTS and not all(one.done() for one in clients):
                await asyncio.sleep(0.001)  # until one was asked for after the swap
    done.set()
    await asyncio.gather(*clients)
    return answers, failures
