"""Calls at a given rate, or as fast as they are answered; and what became of them."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from bertology_serve.bench.prove.stage import HEADERS, WORDS
from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes
from bertology_serve.errors import VerificationError

Ask = Callable[[], bytes]


@dataclass
class Outcomes:
    """Seconds of the calls that were answered and of those that were refused; ``broken`` had no answer.

    ``unexplained`` refusals had no Retry-After.
    """

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    broken: int = 0
    unexplained: int = 0

    @property
    def count(self) -> int:
        """How many were answered, to divide by. Raises VerificationError for none."""
        if not self.answered:
            raise VerificationError(
                f"no call was answered ({len(self.refused)} refused, {self.broken} broken): nothing can be timed"
            )
        return len(self.answered)

    def note(self, status: int, seconds: float, told: bool) -> None:
        """One call."""
        (self.answered if status == 200 else self.refused).append(seconds)
        self.unexplained += status != 200 and not told

    def add(self, other: Outcomes) -> None:
        """Those of another round too."""
        self.answered += other.answered
        self.refused += other.refused
        self.broken += other.broken
        self.unexplained += other.unexplained


def predict(delta: str, text: str | Sequence[str], delay_ms: int = 0) -> bytes:
    """The bytes of a call of /predict."""
    texts = [text] if isinstance(text, str) else text
    body = msgspec.json.encode([{"delta": delta, "text": one} for one in texts])
    headers = (
        HEADERS | {"Content-Type": "application/json"} | ({"X-Request-Timeout-Ms": str(delay_ms)} if delay_ms else {})
    )
    return request_bytes("POST", "/predict", body, headers)


def distinct(draw: random.Random, delta: str, texts: int = 8, words: int = 30) -> Ask:
    """Calls of so many texts, none of them twice among 256 calls: equal ones would be computed once."""
    calls = [predict(delta, [" ".join(draw.choices(WORDS, k=words)) for _ in range(texts)]) for _ in range(256)]
    return itertools.cycle(calls).__next__


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed; endless without values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("inf")


async def closed(url: str, ask: Ask, clients: int, seconds: float, outcomes: Outcomes | None = None) -> Outcomes:
    """So many clients, each asking again when it was answered; once at least, however slow the machine."""
    found, end = outcomes or Outcomes(), time.perf_counter() + seconds

    async def one() -> None:
        async with Wire(url) as wire:
            await _call(wire, ask(), found, time.perf_counter())
            while time.perf_counter() < end:
                await _call(wire, ask(), found, time.perf_counter())

    await asyncio.gather(*(one() for _ in range(clients)))
    return found


async def opened(
    url: str, ask: Ask, rate: float, seconds: float, seed: int = 0, most: int = 256, burst: float = 1.0
) -> Outcomes:
    """Poisson arrivals at ``rate`` a second, whether or not those before were answered; ``most`` connections.

    With ``burst`` above 1 so many come together on average, as many a second as ever.
    Seconds count from the time at which a call was due, so that waiting for a connection is not left out.
    """
    found, draw, idle = Outcomes(), random.Random(seed), list[Wire]()
    gate, tasks = asyncio.Semaphore(most), set[asyncio.Task[None]]()

    async def one(due: float) -> None:
        async with gate:
            wire = idle.pop() if idle else Wire(url)
            await _call(wire, ask(), found, due)
            idle.append(wire)

    due = time.perf_counter()
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        for _ in range(together(draw, burst)):
            task = asyncio.create_task(one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        due += draw.expovariate(rate / burst)
    await asyncio.gather(*tasks)
    for wire in idle:
        wire.close()
    return found


def together(draw: random.Random, mean: float) -> int:
    """How many calls come at once: geometric with that mean, from 1."""
    count = 1
    while draw.random() >= 1 / mean:
        count += 1
    return count


async def _call(wire: Wire, request: bytes, found: Outcomes, started: float) -> None:
    try:
        reply = await wire.send(request)
    except (Broken, ConnectionError):
        found.broken += 1
        return
    found.note(reply.status, time.perf_counter() - started, "retry-after" in reply.headers)
