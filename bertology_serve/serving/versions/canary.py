"""Which version answers a call that names none: a canary takes a share, a shadow is asked and only compared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bertology_serve.encoder.pipeline import Prediction, Request
from bertology_serve.errors import BertologyError
from bertology_serve.files import JsonMapping
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.metrics import Metrics
from bertology_serve.serving.versions.desired import Split

Ask = Callable[[Sequence[Request]], Awaitable[Sequence[Prediction]]]


class Splits(dict[str, Split]):
    """The splits by delta. ``draw()`` gives numbers from 0 to 1."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        super().__init__()
        self._draw = draw

    def of(self, name: str) -> Split:
        """A delta's split; without one nothing stands beside it."""
        return self.get(name, Split())

    def put(self, name: str, split: Split) -> None:
        if split.versions:
            self[name] = split
        else:
            self.pop(name, None)

    def version(self, name: str) -> str:
        """The canary's version where this call is one of its, else nothing."""
        split = self.of(name)
        return split.canary if split.canary and self._draw() < split.share else ""


LAST = 10**6  # the priority of shadows: after everything else of their delta
MOST = 64  # calls of shadows under way; what is beyond is not asked
AGREES, DIFFERS, FAILED = "agrees", "differs", "failed"
DECISIONS = ("label", "choice", "tags", "entities", "answer")
CLOSE = 1e-3


class Shadows:
    """Belongs to the event loop. Nothing that happens here reaches a caller, nor any limit of theirs.

    ``ask`` answers requests, each by the version that it names, with the priority ``LAST``.
    """

    def __init__(self, ask: Ask, splits: Splits, metrics: Metrics, background: Background) -> None:
        self._ask, self._splits, self._metrics, self._background = ask, splits, metrics, background
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, requests: Sequence[Request], answers: Sequence[Prediction]) -> None:
        asked = []
        for request, answer in zip(requests, answers, strict=True):
            shadow = self._splits.of(request.delta).shadow
            if shadow:
                asked.append((replace(request, version=shadow), answer))
        if asked and len(self._tasks) < MOST:
            task = self._background.once("shadow", partial(self._compare, asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _compare(self, asked: Sequence[tuple[Request, Prediction]]) -> None:
        found: Sequence[Prediction] = ()
        try:
            found = await self._ask([request for request, _ in asked])
        except BertologyError:
            return
        finally:
            for request, _ in () if found else asked:
                self._metrics.shadow(request.delta, request.version, FAILED)
        for (request, answer), other in zip(asked, found, strict=True):
            outcome = AGREES if agree(answer.answer, other.answer) else DIFFERS
            self._metrics.shadow(request.delta, request.version, outcome)


def agree(one: JsonMapping, other: JsonMapping) -> bool:
    """Whether two answers decide the same: label, choice, entities, span; for numbers, whether they are close."""
    for name in DECISIONS:
        if name in one or name in other:
            return bool(_decision(one.get(name)) == _decision(other.get(name)))
    mine, theirs = _numbers(one), _numbers(other)
    alike = "sparse" in one or mine.keys() == theirs.keys()  # weights that are not there are 0
    return alike and all(abs(mine.get(key, 0.0) - theirs.get(key, 0.0)) <= CLOSE for key in mine | theirs)


def _decision(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: part for name, part in value.items() if name != "score"}
    return [_decision(part) for part in value] if isinstance(value, list | tuple) else value


def _numbers(answer: JsonMapping) -> dict[int, float]:
    """What an answer says in numbers, by their place."""
    if "sparse" in answer:
        return {entry["index"]: entry["value"] for entry in answer["sparse"]}
    value = answer.get("value", answer.get("embedding"))
    if value is None:
        value = [number for row in answer.get("vectors", ()) for number in row]
    return dict(enumerate([value] if isinstance(value, int | float) else value))
