"""Work that goes on beside the calls: every loop and every thread that nobody waits for is started here.

One that ends by an error is logged, counted and started again, each time after a longer pause; until it runs again it
counts as down, and readiness follows those without which no call is answered (``vital``).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bertology_serve.errors import printable
from bertology_serve.serving.observability.logs import place_of

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds; each pause is twice the one before
STEADY = 60.0  # seconds after which what ran is well again, and the next pause is the first


@dataclass
class WorkState:
    """How a piece of work does. ``faults`` counts the errors that ended it."""

    vital: bool = False
    up: bool = True
    faults: int = 0
    pause: float = FIRST_PAUSE


class Background:
    """The loops and threads of one server, by name. For any thread, but tasks belong to the event loop.

    ``works`` says how each does.
    """

    def __init__(self) -> None:
        self.works: dict[str, WorkState] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_up(self) -> bool:
        return all(state.up for state in list(self.works.values()) if state.vital)

    def loop(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Runs a coroutine until ``close``; it ends before only by an error."""
        state = self._known(name, vital=False)

        async def go() -> None:
            while True:
                started = time.monotonic()
                try:
                    await run()
                    return
                except Exception as problem:
                    pause = self._ended(name, state, problem, time.monotonic() - started)
                await asyncio.sleep(pause)
                state.up = True

        self._keep(asyncio.get_running_loop().create_task(go(), name=name))

    def once(self, name: str, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Runs a coroutine once; an error is logged and counted, and that is all."""
        state = self._known(name, vital=False)

        async def go() -> None:
            try:
                await run()
            except Exception as problem:
                state.faults += 1
                log.error("%s: %s", name, place_of(problem))

        return self._keep(asyncio.get_running_loop().create_task(go(), name=name))

    def thread(self, name: str, run: Callable[[], None], vital: bool = False) -> threading.Thread:
        """Runs a function in a thread of its own until it returns."""
        state = self._known(name, vital)

        def go() -> None:
            while True:
                started = time.monotonic()
                try:
                    run()
                    return
                except BaseException as problem:  # nobody else would hear of it, not even of SystemExit
                    pause = self._ended(name, state, problem, time.monotonic() - started)
                time.sleep(pause)
                state.up = True

        thread = threading.Thread(target=go, name=name, daemon=True)
        thread.start()
        return thread

    async def close(self) -> None:
        """Ends the tasks; threads end when what they run returns."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _known(self, name: str, vital: bool) -> WorkState:
        state = self.works.setdefault(name, WorkState())
        state.vital, state.up = vital, True
        return state

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _ended(self, name: str, state: WorkState, problem: BaseException, seconds: float) -> float:
        """Notes an end; for how long to wait before the next beginning."""
        state.up, state.faults = False, state.faults + 1
        pause = FIRST_PAUSE if seconds > STEADY else state.pause
        state.pause = min(2 * pause, LONGEST_PAUSE)
        log.error("%s ended (%s); it begins again in %g s", name, place_of(problem), pause)
        return pause


class OnceLogger:
    """What was logged of a kind of problem, so that each is said once, until it changes or is over. For any thread."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._lock = log, threading.Lock()
        self.problems: dict[str, str] = {}

    def say(self, what: str, reason: str) -> None:
        """Logs it unless it was the last thing that was said of this."""
        with self._lock:
            known, self.problems[what] = self.problems.get(what), reason
        if known != reason:
            self._log.warning("%s", printable(reason if what in reason else f"{what}: {reason}"))

    def over(self, what: str) -> None:
        """Forgets what is well again."""
        with self._lock:
            self.problems.pop(what, None)

    def keep(self, still: set[str]) -> None:
        """Forgets everything but ``still``."""
        with self._lock:
            self.problems = {what: reason for what, reason in self.problems.items() if what in still}
