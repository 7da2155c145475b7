"""Times batches of growing size at the start, and keeps what was found on this machine, unless the machine was busy."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Event
from typing import TYPE_CHECKING

import msgspec

from bertology_serve.encoder.delta_set import DeltaSet
from bertology_serve.encoder.pipeline import Job, Request
from bertology_serve.errors import DataError
from bertology_serve.export.installation import environment
from bertology_serve.files import JsonMapping, JsonObject, cache_folder, is_own
from bertology_serve.serving.batching.queue import WHOLE, BatchTimes, Sample
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.execution.engine_choice import EngineConfig
from bertology_serve.serving.offline import writing

if TYPE_CHECKING:
    from bertology_serve.serving.execution.startup import Startup


SENTENCE = "a sentence of some twenty words or so, as people send them to a server that reads what they mean"
LONG = " ".join([SENTENCE] * 16)
FIRST, REPEATS = 32, 3
WARM_UP = ("warm", "a warm-up sentence of some length", "another one, " * 20)


def climb(pipeline: DeltaSet, cap: float, most: int, clock: Callable[[], float] = time.perf_counter) -> list[Sample]:
    """(tokens, Σlen², seconds) of batches of about 32 tokens, 64, 128 ... up to ``most``, or until one takes twice
    ``cap`` and five times as long as the first, which is mostly the fixed part of a batch (``times.WHOLE``): of short
    sentences, then of a text as long as the encoder's base reads.
    """
    rungs: list[Sample] = []
    for text in (SENTENCE, LONG):
        jobs, last = [_shuffled(pipeline, text, 0)], 0.0
        size = FIRST if text == SENTENCE else jobs[0].cost
        while size <= max(most, FIRST) and last <= max(2 * cap, WHOLE * (rungs[0][2] if rungs else 0.0)):
            count = max(1, round(size / jobs[0].cost))
            jobs += [_shuffled(pipeline, text, number) for number in range(len(jobs), count)]
            last = _timed(pipeline, jobs, clock)
            rungs.append((sum(job.cost for job in jobs), sum(job.squares for job in jobs), last))
            size *= 2
    return rungs


def _shuffled(pipeline: DeltaSet, text: str, seed: int) -> Job:
    """A text's words in another order: equal texts would be computed once."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return _job(pipeline, " ".join(words))


def _job(pipeline: DeltaSet, text: str) -> Job:
    """For the bare encoder, which need not be one that calls may ask."""
    job = Job(Request("warm-up", {"text": text}), pipeline.base)
    pipeline.tokenise(job)
    return job


def _timed(pipeline: DeltaSet, jobs: list[Job], clock: Callable[[], float]) -> float:
    """The least seconds of a batch: what else the machine does only adds to them."""
    seconds = []
    for _ in range(REPEATS):
        start = clock()
        pipeline.run(jobs)
        seconds.append(clock() - start)
    return min(seconds)


log = logging.getLogger(__name__)
DAYS = 7.0  # after which it is found anew
IDLE, LOOKS = 0.5, 60.0  # load for each processor up to which the machine is idle; seconds between two looks at it
BUSY = 1.5  # two times of one batch, or load and processors, that are so many times apart: the machine was busy
SECOND_LOOK = 128  # tokens of the largest batch that is timed a second time
SETTLED = ("cpu", "cores", "threads", "versions")  # of the environment: what does not change by itself


@dataclass(frozen=True)
class Findings:
    """``setting`` as it was settled; ``ladder`` how long batches took."""

    setting: EngineConfig
    ladder: tuple[Sample, ...]


def circumstances(pipeline: DeltaSet, setting: EngineConfig, config: ServerConfig, device: str) -> JsonObject:
    """All that findings follow from."""
    here = environment()
    return {
        **{name: here[name] for name in SETTLED},
        "weights": pipeline.encoder.ref.sha256,
        "dtype": str(pipeline.encoder.dtype),
        "device": device,
        "executor": [type(pipeline).__name__, pipeline.parallel],
        "setting": asdict(setting),
        "batch": [config.batching.max_batch_ms, config.batching.max_batch_tokens],
    }


def warm_up(pipeline: DeltaSet, times: BatchTimes, known: Sequence[Sample] = ()) -> list[Sample]:
    """Runs a few sentences, so that the first call finds kernels and memory in place; times a ladder of sizes, or
    takes one that is ``known``. Returns the ladder, by which ``times`` begin.
    """
    for count in (1, 4):
        pipeline.run([_job(pipeline, f"{text} {number}") for text in WARM_UP for number in range(count)])
    ladder = list(known) or climb(pipeline, times.cap, times.most)
    times.start(ladder)
    log.info(
        "a batch takes %.1f ms and %.1f µs a token, %.3f %% more for each before it: %d tokens in %.0f ms (cap %g)",
        1e3 * times.fixed, 1e6 * times.per_token, 100 * times.bend, times.budget,
        1e3 * times.seconds(times.budget), 1e3 * times.cap,
    )  # fmt: skip
    return ladder


def find(
    opened: Startup, times: BatchTimes, wanted: EngineConfig, where: JsonMapping, known: Findings | None
) -> tuple[str, bool]:
    """Settles what runs the batches and how long they take, from what is ``known`` or by timing.

    The engine's name, and whether it may be relied on: what is known is timed again where a short second look shows
    that it was found on a busy machine, and what is timed now is kept unless this machine is busy. Raises what
    ``opened.settle`` does.
    """
    pipeline = opened.pipeline
    if known is not None:
        runs, _ = opened.settle(known.setting)
        warm_up(pipeline, times, known.ladder)
        slower = _times_as_long(known.ladder, _second_look(pipeline, times))
        if slower <= BUSY:
            return runs, True
        log.info("engines and batches are timed again: batches took %.1f times as long at an earlier start", slower)
    runs, setting = opened.settle(wanted)
    ladder = warm_up(pipeline, times)
    doubt = _doubt(ladder, _second_look(pipeline, times))
    if doubt:
        log.warning("the machine seems busy (%s): timings are not kept, and made again when it is idle", doubt)
    else:
        keep(where, Findings(setting, tuple(ladder)))
    return runs, not doubt


def find_again(
    opened: Startup,
    times: BatchTimes,
    wanted: EngineConfig,
    where: JsonMapping,
    items: Callable[[], int],
    ended: Event,
) -> None:
    """Finds everything anew once there are no ``items`` to answer and the machine is idle, until it may be relied on.

    For a thread of its own, which ``ended`` ends. No batch runs meanwhile: a call that comes then waits some seconds.
    """
    sure = False
    while not sure and not ended.wait(LOOKS):
        if not items() and os.getloadavg()[0] <= IDLE * (os.cpu_count() or 1):
            with opened.pipeline.encoder.lock:
                _, sure = find(opened, times, wanted, where, None)


def _second_look(pipeline: DeltaSet, times: BatchTimes) -> list[Sample]:
    return climb(pipeline, times.cap, SECOND_LOOK)


def _times_as_long(ladder: Sequence[Sample], again: Sequence[Sample]) -> float:
    """How many times as long a ladder's batches took as the same ones timed again: the median; endless for none."""
    known = {(tokens, squares): seconds for tokens, squares, seconds in ladder}
    ratios = [known[rung[:2]] / rung[2] for rung in again if rung[:2] in known]
    return median(ratios) if ratios else math.inf


def _doubt(ladder: Sequence[Sample], again: Sequence[Sample]) -> str:
    """Why a ladder is not what a quiet machine gives; nothing where it may be."""
    for (tokens, _, seconds), (more, _, less) in pairwise(ladder):
        if more > tokens and seconds > BUSY * less:
            return f"{tokens} tokens took {1e3 * seconds:.1f} ms, {more} took {1e3 * less:.1f} ms"
    slower = _times_as_long(ladder, again)
    if not 1 / BUSY <= slower <= BUSY:
        return f"batches took {slower:.1f} times as long as a second time"
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"load {load:.1f} on {cores} processors" if load > BUSY * cores else ""


def recall(where: JsonMapping, folder: Path | None = None) -> Findings | None:
    """What was found in the same circumstances within the last week, ``None`` where nothing was that can be read."""
    try:
        path = _path(where, folder)
        if time.time() - path.stat().st_mtime > DAYS * 86_400 or not is_own(path):
            return None
        found = msgspec.json.decode(path.read_bytes(), type=Findings)
    except (OSError, ValueError):
        return None
    return found if found.ladder and all(min(rung) > 0 for rung in found.ladder) else None


def keep(where: JsonMapping, findings: Findings, folder: Path | None = None) -> None:
    """Writes them down; where that cannot be, the next start measures again."""
    try:
        path = _path(where, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(str(path)) as file:
            file.write(msgspec.json.encode(findings))
    except (OSError, DataError) as problem:
        log.info("what was timed is not kept: %s", problem)


def _path(where: JsonMapping, folder: Path | None) -> Path:
    """Raises OSError where there is no place."""
    kept = folder or cache_folder("findings")
    if kept is None:
        raise OSError("this user has no cache of their own")
    return kept / f"{hashlib.sha256(msgspec.json.encode(where, order='sorted')).hexdigest()[:32]}.json"
