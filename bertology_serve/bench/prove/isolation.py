"""Figure 2: every row of a mixed batch equals its solo run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import WORDS, ZOO, Stage
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.serving.versions.delta_registry import Registry

BOUND = 1e-5
BATCH = 48
Numbers = list[float]


def measure(stage: Stage) -> Measured:
    """Solo runs of a few texts for every delta of the zoo and the bare base; then random mixed batches of those."""
    rows, texts = stage.count(3_000, 100_000), stage.count(20, 400)
    registry = Registry(Pipeline(stage.encoder))
    registry.load(stage.zoo)
    pipeline, draw = registry.pipeline, random.Random(0)
    requests = [
        Request(name, {"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 40)))}, logits=name != "base")
        for name in (*ZOO, "base")
        for _ in range(texts)
    ]
    jobs = [pipeline.prepare(request) for request in requests]
    solo = [numbers_of(pipeline.run([job])[0].answer) for job in jobs]
    worst, swapped, done = 0.0, 0, 0
    while done < rows:
        chosen = draw.choices(range(len(jobs)), k=min(BATCH, rows - done))
        for index, prediction in zip(chosen, pipeline.run([jobs[index] for index in chosen]), strict=True):
            difference = apart(numbers_of(prediction.answer), solo[index])
            worst = max(worst, difference)
            swapped += prediction.delta != requests[index].delta or difference > 1e-3
        done += len(chosen)
    words = f"{worst:.1e} over {done:,} rows of {len(ZOO) + 1} deltas; {swapped} swapped"
    return Measured(words, worst <= BOUND and not swapped, {"worst": worst, "rows": done, "swapped": swapped})


def numbers_of(answer: Mapping[str, Any]) -> Numbers:
    """The numbers of an answer that are not decisions: logits where there are some, else the embedding."""
    return flat(answer["logits"] if "logits" in answer else answer["embedding"])


def flat(values: Any) -> Numbers:
    """Nested lists as one."""
    if not isinstance(values, Sequence):
        return [float(values)]
    return [number for value in values for number in flat(value)]


def apart(one: Numbers, other: Numbers) -> float:
    """The largest difference; endless where they differ in number, or one of them is no number."""
    if len(one) != len(other) or any(map(math.isnan, (*one, *other))):
        return math.inf
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)
