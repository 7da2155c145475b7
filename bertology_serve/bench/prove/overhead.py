"""Figure 13: what a call costs besides tokenizer and model, and what is left of the engine's speed over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median

from bertology_serve.bench.prove.cores import ONE_THREAD, alone, apart
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import WORDS, Served, Stage, serving
from bertology_serve.bench.prove.traffic import closed, predict
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.serving.execution.engine_choice import settle
from bertology_serve.serving.versions.delta_registry import Registry

BOUND, SHARE = 150e-6, 0.85
CLIENTS = 16
BUDGET = 1024


@dataclass(frozen=True)
class Speed:
    """Texts a second, and CPU milliseconds for each."""

    texts_s: float
    cpu_ms: float


def measure(stage: Stage) -> Measured:
    """CPU seconds of a server with a stub for a pipeline; texts a second of a real one, in turns with its bare engine.

    The bare engine runs where the server's executor does, with as many threads and in batches as large.
    """
    seconds, rounds = stage.seconds(2.0, 15.0), max(stage.rounds, stage.count(3, 5))
    command = [sys.executable, "-m", "bertology_serve.bench.prove.stub", stage.backbone]
    with serving(command, ONE_THREAD) as served, apart(served.pid):
        each = median(asyncio.run(_cost(served, seconds)) for _ in range(rounds))
        stage.served_cpu += served.cpu
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(8, 40))) for _ in range(256)]
    bare, through = list[Speed](), list[Speed]()
    with _engine(stage) as (pipeline, name):
        options = ("--max-batch-ms", "2000", "--max-batch-tokens", str(BUDGET), "--engine", name)
        with stage.server(stage.zoo, *options, environ=ONE_THREAD) as real, apart(real.pid) as pinned:
            for _ in range(rounds):
                with alone():
                    bare.append(_bare(pipeline, texts, seconds))
                through.append(asyncio.run(_through(real, texts, seconds)))
    share = median(one.texts_s / other.texts_s for one, other in zip(through, bare, strict=True))
    of_cpu = median(other.cpu_ms / one.cpu_ms for one, other in zip(through, bare, strict=True))
    speed = median(one.texts_s for one in bare)
    words = (
        f"{1e6 * each:.0f} µs a call; over HTTP {100 * share:.0f} % of the engine's {speed:.0f} texts/s "
        f"({100 * of_cpu:.0f} % by CPU seconds)"
    )
    facts = {"cpu_us": 1e6 * each, "bare": [asdict(one) for one in bare], "http": [asdict(one) for one in through],
             "pinned": pinned}  # fmt: skip
    return Measured(words, each <= BOUND and share >= SHARE, facts)


async def _cost(served: Served, seconds: float) -> float:
    ask = predict("base", "the river bank was very cold")
    await closed(served.url, lambda: ask, CLIENTS, seconds / 5)
    before = served.cpu
    calls = (await closed(served.url, lambda: ask, CLIENTS, seconds)).count
    return (served.cpu - before) / calls


@contextmanager
def _engine(stage: Stage) -> Iterator[tuple[Pipeline, str]]:
    """The zoo's pipeline on one thread, with the engine that a server would take, and that one's option."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipeline = Pipeline(stage.encoder)
        Registry(pipeline).load(stage.zoo)
        yield pipeline, "torch" if settle(pipeline, "auto") == "torch" else "onnx"
    finally:
        torch.set_num_threads(threads)


def _bare(pipeline: Pipeline, texts: list[str], seconds: float) -> Speed:
    """Batches of 1,024 tokens, tokenising included; one at least, however slow the machine."""
    done, started, cpu = 0, time.perf_counter(), time.process_time()
    waiting = itertools.cycle(texts)
    while not done or time.perf_counter() - started < seconds:
        jobs, tokens = [], 0
        while tokens < BUDGET:
            jobs.append(pipeline.prepare(Request("mood", {"text": next(waiting)})))
            tokens += jobs[-1].cost
        done += len(pipeline.run(jobs))
    return Speed(done / (time.perf_counter() - started), 1e3 * (time.process_time() - cpu) / done)


async def _through(served: Served, texts: list[str], seconds: float) -> Speed:
    """Over HTTP, eight in a call."""
    calls = [predict("mood", texts[at : at + 8]) for at in range(0, len(texts), 8)]
    ask = itertools.cycle(calls).__next__  # no two of the same texts at a time: those would be computed once
    await closed(served.url, ask, CLIENTS, seconds / 5)
    started, cpu = time.perf_counter(), served.cpu
    found = 8 * (await closed(served.url, ask, CLIENTS, seconds)).count
    return Speed(found / (time.perf_counter() - started), 1e3 * (served.cpu - cpu) / found)
