"""Calls in, answers out: limits, tokenising, the queue, the executor. HTTP lies above, all numerics below."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bertology_serve.encoder.pipeline import BASE, DeltaSet, Job, Prediction, Request
from bertology_serve.errors import DataError, Expired, LimitError, Overloaded
from bertology_serve.serving.batching.queue import BatchTimes, Sample, WorkQueue
from bertology_serve.serving.batching.scheduler import CallOptions, FairScheduler, Outcome, Ticket, Work
from bertology_serve.serving.batching.warmup import climb
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.execution.executor import Executor
from bertology_serve.serving.observability import metrics as outcomes
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.metrics import Health, LoopLag, Metrics
from bertology_serve.serving.protocol.json_codec import check_items, check_size

log = logging.getLogger(__name__)
INLINE = 4096  # bytes or characters of a call that is read, tokenised and written without a thread for it
MOST_ASIDE = 32  # larger ones that are, or wait to be
T = TypeVar("T")
DEFAULT = CallOptions()
READY, RESTARTING, DRAINING = "ready", "restarting", "draining"
WARM_UP = ("warm", "a warm-up sentence of some length", "another one, " * 20)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Engine:
    """Answers calls with one pipeline. Belongs to the event loop that ``start`` was called in.

    ``ready`` says whether new calls are welcome; while the server drains, or its executor is replaced, it is false, yet
    calls are still answered.
    """

    def __init__(
        self, pipeline: DeltaSet, config: ServerConfig, metrics: Metrics, background: Background | None = None
    ) -> None:
        self.config, self.pipeline, self.metrics = config, pipeline, metrics
        self.background = background or Background()
        times = BatchTimes(1e-3 * config.max_batch_ms, config.max_batch_tokens)
        scheduler = FairScheduler(times.budget, config.weight_of())
        self.queue = WorkQueue(scheduler, times, config.max_queue_tokens, config.max_delta_tokens)
        self._executor = Executor(self.queue, pipeline.run, self._deliver, metrics.batch, self.background)
        self._tokenizers, self._aside = ThreadPoolExecutor(2, thread_name_prefix="tokenizer"), 0
        self._lag = LoopLag(metrics.registry)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = False
        metrics.watch(self.queue)
        metrics.registry.register(Health(lambda: self.ready, pipeline, self.background))

    @property
    def state(self) -> str:
        """``READY``, ``RESTARTING`` while the executor is replaced, or ``DRAINING``."""
        if not self._ready:
            return DRAINING
        return READY if self.pipeline.is_up and self.background.is_up else RESTARTING

    @property
    def ready(self) -> bool:
        """Whether new calls are welcome."""
        return self.state == READY

    def warm_up(self, known: Sequence[Sample] = ()) -> list[Sample]:
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
        self._lag.start(self._loop)
        self._ready = True

    def drain(self) -> None:
        """Tells the world to send calls elsewhere; those that come anyway are answered. For any thread."""
        self._ready = False

    async def stop(self) -> bool:
        """Refuses new calls and answers those accepted; whether all of them were, within the configured time."""
        self.drain()
        done = await asyncio.to_thread(self._executor.stop, self.config.shutdown_seconds)
        self._tokenizers.shutdown(wait=False)
        self._lag.stop()
        return done

    async def answer(
        self,
        requests: Sequence[Request],
        terms: CallOptions = DEFAULT,
    ) -> list[Prediction]:
        """The answers of one call, in order.

        Raises what is wrong with the first bad request (DataError, NotFound, LimitError), what charging raises, or
        Overloaded; ClientGone where the caller has left; Expired where the answer takes longer than the terms, or the
        configuration, allow.
        """
        assert self._loop is not None, "start() comes first"
        seconds = min(terms.seconds, self.config.max_call_seconds)
        deadline = time.monotonic() + seconds
        ticket = Ticket(await self._prepare(requests), self._loop, deadline, terms.priority)
        try:
            return await self._answered(ticket, terms, deadline, seconds)
        finally:
            ticket.works = []  # they know the ticket: what they hold would stay until a garbage collection

    async def _answered(self, ticket: Ticket, terms: CallOptions, deadline: float, seconds: float) -> list[Prediction]:
        try:
            self.queue.put(ticket.works, terms.charge)
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
        check_items(len(requests), config.max_items)
        self._check_room(requests)
        characters = sum(check_size(request, config.max_text_characters) for request in requests)
        return await self.aside(characters, lambda: self._jobs(requests))

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What ``work`` gives; done on a thread where it is large, so that other calls need not wait for it.

        ``size`` is in bytes or characters that it reads or writes. Overloaded where too much waits for a thread.
        """
        if size <= INLINE:
            return work()
        if self._aside >= MOST_ASIDE:
            raise Overloaded(f"{self._aside} large calls are being read; try again in 1 s", retry_after=1.0)
        self._aside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizers, work)
        finally:
            self._aside -= 1

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
        """Tokenises, up to the first item that is too long, or too much for a queue that were empty."""
        jobs, config = list[Job](), self.config
        costs, total = dict[str, int](), 0
        for request in requests:
            job = self.pipeline.prepare(request)
            if job.cost > config.max_item_tokens:
                raise LimitError(
                    f"{job.request.where}: {job.cost} tokens, all windows or choices together; at most "
                    f"{config.max_item_tokens} are taken, send a shorter text"
                )
            jobs.append(job)
            total += job.cost
            costs[request.delta] = own = costs.get(request.delta, 0) + job.cost
            for cost, most, where in (
                (total, config.max_queue_tokens, ""), (own, config.max_delta_tokens, " for one delta"),
            ):  # fmt: skip
                if cost > most:
                    raise LimitError(
                        f"the call holds {cost} tokens{where} or more; at most {most} are taken, send several"
                    )
        return jobs

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
