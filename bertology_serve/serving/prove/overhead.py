"""Figure 13: what a call costs besides tokenizer and model, and what is left of the engine's speed over HTTP."""

from __future__ import annotations

import asyncio
import random
import sys
import time

from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.serving.prove.figure import Measured
from bertology_serve.serving.prove.stage import WORDS, Served, Stage, serving
from bertology_serve.serving.prove.traffic import closed, predict
from bertology_serve.serving.registry import Registry

BOUND, SHARE = 150e-6, 0.85
CLIENTS = 16
BUDGET = 1024


def measure(stage: Stage) -> Measured:
    """CPU seconds of a server with a stub for a pipeline; tokens a second of a real one, beside its bare engine."""
    seconds = stage.seconds(5.0, 20.0)
    command = [sys.executable, "-m", "bertology_serve.serving.prove.stub", stage.backbone]
    with serving(command, {}) as served:
        each = asyncio.run(_cost(served, seconds))
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(8, 40))) for _ in range(256)]
    bare = _bare(stage, texts, seconds)
    with stage.server(stage.zoo, "--max-batch-ms", "80") as real:
        through = asyncio.run(_through(real.url, texts, seconds))
    words = f"{1e6 * each:.0f} µs a call; over HTTP {100 * through / bare:.0f} % of the engine's {bare:.0f} texts/s"
    holds = each <= BOUND and through >= SHARE * bare
    return Measured(words, holds, {"cpu_us": 1e6 * each, "bare_texts_s": bare, "http_texts_s": through})


async def _cost(served: Served, seconds: float) -> float:
    ask = predict("base", "the river bank was very cold")
    await closed(served.url, lambda: ask, CLIENTS, 1.0)
    before = served.cpu
    calls = len((await closed(served.url, lambda: ask, CLIENTS, seconds)).answered)
    return (served.cpu - before) / calls


def _bare(stage: Stage, texts: list[str], seconds: float) -> float:
    """Texts a second of batches of 1,024 tokens, tokenising included."""
    registry = Registry(Pipeline(stage.encoder))
    registry.load(stage.zoo)
    pipeline, done = registry.pipeline, 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        at = 0
        while at < len(texts):
            jobs, tokens = [], 0
            while at < len(texts) and tokens < BUDGET:
                jobs.append(pipeline.prepare(Request("mood", {"text": texts[at]})))
                tokens += jobs[-1].cost
                at += 1
            done += len(pipeline.run(jobs))
    return done / (time.perf_counter() - started)


async def _through(url: str, texts: list[str], seconds: float) -> float:
    """Texts a second over HTTP, eight in a call."""
    calls = [predict("mood", texts[at : at + 8]) for at in range(0, len(texts), 8)]
    draw = random.Random(1)
    await closed(url, lambda: draw.choice(calls), CLIENTS, 1.0)
    started = time.perf_counter()
    found = await closed(url, lambda: draw.choice(calls), CLIENTS, seconds)
    return 8 * len(found.answered) / (time.perf_counter() - started)
