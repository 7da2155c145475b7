"""Dynamic batching as it is commonly written: what waits for the same model is answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

MOST = 32  # texts in one batch
Answers = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """One text for one task, and who waits for its answer."""

    task: str
    text: str
    answer: asyncio.Future[dict[str, Any]]


class Collector:
    """Runs ``answer(tasks, texts)`` on one thread, for whatever waits whenever that is free.

    Texts share a batch where ``mixed``, or where they are for the same task; the oldest text's task goes first.
    """

    def __init__(self, answer: Callable[[Sequence[str], Sequence[str]], Answers], mixed: bool) -> None:
        self._answer, self._mixed = answer, mixed
        self._waiting: list[Asked] = []
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    async def ask(self, task: str, text: str) -> dict[str, Any]:
        """The answer to one text."""
        asked = Asked(task, text, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._came.set()
        return await asked.answer

    async def run(self) -> None:
        """Answers until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            batch = self._next()
            tasks, texts = [one.task for one in batch], [one.text for one in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, tasks, texts)
            except Exception as problem:
                for one in batch:
                    one.answer.set_exception(problem)
                continue
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    def _next(self) -> list[Asked]:
        first = self._waiting[0].task
        batch = [one for one in self._waiting if self._mixed or one.task == first][:MOST]
        taken = set(map(id, batch))
        self._waiting = [one for one in self._waiting if id(one) not in taken]
        if not self._waiting:
            self._came.clear()
        return batch
