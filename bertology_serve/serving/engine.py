"""Calls in, answers out: limits, tokenising, the queue, the executor. HTTP lies above, all numerics below."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bertology_serve.encoder.pipeline import BASE, Job, Prediction, Request, Residents
from bertology_serve.errors import DataError, Expired, LimitError, Overloaded
from bertology_serve.serving import metrics as outcomes
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.executor import Executor
from bertology_serve.serving.ladder import climb
from bertology_serve.serving.metrics import Metrics
from bertology_serve.serving.queue import WorkQueue
from bertology_serve.serving.scheduler import FairScheduler
from bertology_serve.serving.sizes import check_size
from bertology_serve.serving.terms import Terms
from bertology_serve.serving.times import BatchTimes, Rung
from bertology_serve.serving.vitals import Vitals
from bertology_serve.serving.work import Outcome, Ticket, Work

log = logging.getLogger(__name__)
INLINE_CHARACTERS = 8192
DEFAULT = Terms()
READY, RESTARTING, DRAINING = "ready", "restarting", "draining"
WARM_UP = ("warm", "a warm-up sentence of some length", "another one, " * 20)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Engine:
    """Answers calls with one pipeline. Belongs to the event loop that ``start`` was called in.

    ``ready`` says whether new calls are welcome; while the server drains, or its executor is replaced, it is false, yet
    calls are still answered.
    """

    def __init__(self, pipeline: Residents, config: ServerConfig, metrics: Metrics) -> None:
        self.config, self.pipeline, self.metrics = config, pipeline, metrics
        times = BatchTimes(1e-3 * config.max_batch_ms, config.max_batch_tokens)
        scheduler = FairScheduler(times.budget, config.weight_of())
        self.queue = WorkQueue(scheduler, times, config.max_queue_tokens, config.max_delta_tokens)
        self._executor = Executor(self.queue, pipeline.run, self._deliver, metrics.batch)
        self._tokenizers = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = False
        metrics.watch(self.queue)
        metrics.registry.register(Vitals(lambda: self.ready, pipeline))

    @property
    def state(self) -> str:
        """``READY``, ``RESTARTING`` while the executor is replaced, or ``DRAINING``."""
        if not self._ready:
            return DRAINING
        return READY if self.pipeline.is_up else RESTARTING

    @property
    def ready(self) -> bool:
        """Whether new calls are welcome."""
        return self.state == READY

    def warm_up(self, known: Sequence[Rung] = ()) -> list[Rung]:
        """Runs a few sentences, so that the first call finds kernels and memory in place; times a ladder of sizes, or
        takes one that is ``known``. Returns the ladder.
        """
        for count in (1, 4):
            requests = [Request(BASE, {"text": text}) for text in WARM_UP * count]
            self.pipeline.run([self.pipeline.prepare(request) for request in requests])
        times = self.queue.times
        ladder = list(known) or climb(self.pipeline, times.cap, times.most)
        times.start(ladder)
        log.info(
            "a batch takes %.1f ms and %.1f µs a token, %.3f %% more for each before it: %d tokens in %.0f ms (cap %g)",
            1e3 * times.fixed, 1e6 * times.per_token, 100 * times.bend, times.budget,
            1e3 * times.seconds(times.budget), 1e3 * times.cap,
        )  # fmt: skip
        return ladder

    def admit(self) -> None:
        """Overloaded where no call is taken now, whatever it holds: told before it is read."""
        self.queue.check()

    def start(self) -> None:
        """Takes calls from now on."""
        self._loop = asyncio.get_running_loop()
        self._executor.start()
        self._ready = True

    def drain(self) -> None:
        """Tells the world to send calls elsewhere; those that come anyway are answered. For any thread."""
        self._ready = False

    async def stop(self) -> bool:
        """Refuses new calls and answers those accepted; whether all of them were, within the configured time."""
        self.drain()
        done = await asyncio.to_thread(self._executor.stop, self.config.shutdown_seconds)
        self._tokenizers.shutdown(wait=False)
        return done

    async def answer(
        self,
        requests: Sequence[Request],
        terms: Terms = DEFAULT,
    ) -> list[Prediction]:
        """The answers of one call, in order.

        Raises what is wrong with the first bad request (DataError, NotFound, LimitError), what charging raises, or
        Overloaded; ClientGone where the caller has left; Expired where the answer takes longer than the terms, or the
        configuration, allow.
        """
        assert self._loop is not None, "start() comes first"
        seconds = min(terms.seconds, self.config.max_call_seconds)
        deadline = time.monotonic() + seconds
        jobs = await self._prepare(requests)
        ticket = Ticket(jobs, self._loop, deadline, terms.priority)
        try:
            if terms.charge is not None:
                terms.charge(sum(job.cost for job in jobs))
            self.queue.put(ticket.works)
        except Exception:
            self._finished(ticket.works, outcomes.REFUSED)
            raise
        try:
            await _settled(ticket, terms.gone, deadline)
        except (asyncio.CancelledError, ClientGone):
            self._drop(ticket, outcomes.DROPPED)
            raise
        except Expired:
            self._drop(ticket, outcomes.EXPIRED)
            raise Expired(f"no answer within {seconds:g} s; send less, later, or allow more time") from None
        return self._answers(ticket)

    def _drop(self, ticket: Ticket, outcome: str) -> None:
        self.queue.drop(ticket.works)
        self._finished(ticket.works, outcome)

    async def _prepare(self, requests: Sequence[Request]) -> list[Job]:
        """Checks and tokenises; long texts in a thread of their own, so that short calls need not wait for them."""
        config = self.config
        if not requests:
            raise DataError("the call holds no items; expected at least one")
        if len(requests) > config.max_items:
            raise LimitError(
                f"the call holds {len(requests)} items; at most {config.max_items} are taken, send several"
            )
        self._check_room(requests)
        characters = sum(check_size(request, config.max_text_characters) for request in requests)
        if characters <= INLINE_CHARACTERS:
            return self._jobs(requests)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizers, self._jobs, requests)

    def _check_room(self, requests: Sequence[Request]) -> None:
        """Overloaded where there is no room even for one token an item: told before any work is done."""
        least: dict[str, int] = {}
        for request in requests:
            least[request.delta] = least.get(request.delta, 0) + 1
        try:
            self.queue.check(least)
        except Overloaded:
            self.metrics.refused({name: count for name, count in least.items() if self.pipeline.resident(name)})
            raise

    def _jobs(self, requests: Sequence[Request]) -> list[Job]:
        jobs = [self.pipeline.prepare(request) for request in requests]
        for job in jobs:
            if job.cost > self.config.max_item_tokens:
                raise LimitError(
                    f"{job.request.where}: {job.cost} tokens, all windows or choices together; at most "
                    f"{self.config.max_item_tokens} are taken, send a shorter text"
                )
        self._check_total(jobs)
        return jobs

    def _check_total(self, jobs: Sequence[Job]) -> None:
        """LimitError for a call that could not enter the queue even if it were empty."""
        costs: dict[str, int] = {}
        for job in jobs:
            costs[job.request.delta] = costs.get(job.request.delta, 0) + job.cost
        for cost, most, where in (
            (sum(costs.values()), self.config.max_queue_tokens, ""),
            (max(costs.values()), self.config.max_delta_tokens, " for one delta"),
        ):
            if cost > most:
                raise LimitError(f"the call holds {cost} tokens{where}; at most {most} are taken, send several")

    def _answers(self, ticket: Ticket) -> list[Prediction]:
        answers: list[Prediction] = []
        for outcome in ticket.done.result():
            if isinstance(outcome, Exception):
                self._finished(ticket.works, outcomes.FAILED)
                raise outcome
            answers.append(outcome)
        self._finished(ticket.works, outcomes.ANSWERED)
        return answers

    def _finished(self, works: Sequence[Work], outcome: str) -> None:
        self.metrics.finished(works, outcome, time.monotonic())

    def _deliver(self, batch: Sequence[Work], results: Sequence[Outcome]) -> None:
        """Hands outcomes over to the event loop, one wake-up a batch. In the executor's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_settle, batch, results)
        except RuntimeError:  # the loop has closed: nobody is left to be answered
            log.warning("%d answers came after the server had stopped", len(batch))


def _settle(batch: Sequence[Work], results: Sequence[Outcome]) -> None:
    for work, outcome in zip(batch, results, strict=True):
        work.ticket.settle(work.index, outcome)


async def _settled(ticket: Ticket, gone: Callable[[], Awaitable[None]] | None, deadline: float) -> None:
    """Waits for the ticket; ClientGone when the caller leaves before, Expired at the deadline (of time.monotonic)."""
    loop = asyncio.get_running_loop()
    timer = loop.call_later(deadline - time.monotonic(), ticket.fail, Expired())
    watcher = asyncio.ensure_future(gone()) if gone else None
    if watcher:
        watcher.add_done_callback(lambda _: ticket.fail(ClientGone()))
    try:
        await ticket.done
    finally:
        timer.cancel()
        if watcher:
            watcher.cancel()
