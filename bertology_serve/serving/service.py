"""What every protocol does between reading a call and writing its answer: versions, limits, tokens, the queue, time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Protocol, TypeVar

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import LoadedDelta, Prediction, Request
from bertology_serve.errors import DataError, Expired, LimitError, Overloaded
from bertology_serve.serving.batching.queue import BatchTimes, WorkQueue
from bertology_serve.serving.batching.scheduler import (
    CallContext,
    CallItem,
    CallPart,
    FairScheduler,
    Outcome,
    Twins,
    joined,
    resolve,
    wholes,
)
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.execution.executor import Executor
from bertology_serve.serving.keys import Access
from bertology_serve.serving.observability import metrics as outcomes
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.observability.metrics import Health, LoopLag, Metrics
from bertology_serve.serving.protocol.json_codec import check_sizes
from bertology_serve.serving.versions.canary import LAST, Shadows
from bertology_serve.serving.versions.delta_registry import Registry
from bertology_serve.serving.versions.lifecycle import Lifecycle
from bertology_serve.serving.versions.watcher import Reconciler

log = logging.getLogger(__name__)
INLINE = 4096  # bytes or characters of a call that is read, tokenised and written without a thread for it
STATE_SECONDS = 1.0  # how often the desired-state file is looked at
MOST_ASIDE = 32  # larger ones that are, or wait to be
READY, RESTARTING, DRAINING = "ready", "restarting", "draining"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Cold(Exception):
    """A delta must be loaded before the call can be read."""

    def __init__(self, name: str, version: str | None) -> None:
        super().__init__(name)
        self.name, self.version = name, version


class Parsed(Protocol):
    """What a codec makes of a body."""

    @property
    def requests(self) -> Sequence[Request]: ...


class Find(Protocol):
    """Finds the delta that answers a call, for the codec that reads it; see ``Service.acquire``."""

    def __call__(self, name: str, version: str | None = None) -> Delta: ...


T = TypeVar("T")
P = TypeVar("P", bound=Parsed)


class Service:
    """The deltas of a registry, answering calls. Belongs to the event loop that ``start`` was called in.

    ``ready`` says whether new calls are welcome; while the server drains, or its executor is replaced, it is false, yet
    calls are still answered.
    """

    def __init__(
        self, registry: Registry, config: ServerConfig, metrics: Metrics, background: Background | None = None
    ) -> None:
        self.registry, self.config, self.metrics = registry, config, metrics
        self.pipeline, self.background = registry.pipeline, background or Background()
        self.lifecycle = Lifecycle(registry, metrics, config.deltas.max_cold_calls)
        times = BatchTimes(1e-3 * config.batching.max_batch_ms, config.batching.max_batch_tokens)
        scheduler = FairScheduler(times.budget, config.batching.weight_of(), self.pipeline.encoder.depth)
        self.queue = WorkQueue(scheduler, times, config.batching.max_queue_tokens, config.batching.max_delta_tokens)
        self.reconciler = Reconciler(
            config.deltas.state_file, self.lifecycle, self.queue, config.deltas.watch_seconds or STATE_SECONDS
        )
        self._executor = Executor(
            self.queue, self.pipeline.run, self._deliver, metrics.batch, self.background, self.pipeline.parallel
        )
        self._shadows = Shadows(self._shadowed, registry.splits, metrics, self.background)
        self._tokenizers, self._aside = ThreadPoolExecutor(2, thread_name_prefix="tokenizer"), 0
        self._lag = LoopLag(metrics.registry)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = False
        metrics.watch(self.queue)
        metrics.registry.register(Health(lambda: self.ready, self.pipeline, self.background))

    @property
    def state(self) -> str:
        """``READY``, ``RESTARTING`` while the executor is replaced, or ``DRAINING``."""
        if not self._ready:
            return DRAINING
        return READY if self.pipeline.is_up and self.background.is_up else RESTARTING

    @property
    def ready(self) -> bool:
        return self.state == READY

    def start(self) -> None:
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
        self.lifecycle.close()
        done = await asyncio.to_thread(self._executor.stop, self.config.stopping.shutdown_seconds)
        self._tokenizers.shutdown(wait=False)
        self._lag.stop()
        return done

    def find(self, access: Access, name: str, version: str | None = None) -> Delta:
        """The delta of that name, where the caller may ask it. Raises Forbidden, NotFound."""
        access.check(name)
        return self.registry.find(name, version, access.allows)

    def visible(self, access: Access) -> list[Delta]:
        return [delta for delta in self.registry.all() if access.allows(delta.name)]

    async def serve(
        self, call: CallContext, size: int, read: Callable[[Find], P], write: Callable[[P, list[Prediction]], T]
    ) -> tuple[T, list[Prediction]]:
        """Reads a call of ``size`` bytes, answers it and writes the answer; what was written, and the answers.

        ``read`` gets what finds the deltas that it names. Where one is cold, the call is read again once it is there.
        """
        find: Find = partial(self._find, call)
        try:
            while True:
                try:
                    parsed = await self.aside(size, lambda: read(find))
                    break
                except Cold as cold:
                    await self._warm(call, {cold.name: cold.version})
            found = await self.answer(call, parsed.requests)
            if self.registry.splits:
                self._shadows.send(parsed.requests, found)
            return await self.aside(size_of(found), lambda: write(parsed, found)), found
        finally:
            call.close()

    def _find(self, call: CallContext, name: str, version: str | None = None) -> Delta:
        return self.acquire(call, name, version).delta

    def acquire(self, call: CallContext, name: str, version: str | None = None) -> LoadedDelta:
        """The version of a delta that answers the call, the same one and in memory until the call is answered.

        It is the one that is named, a canary's where the call is one of its, or the one that answers now. Raises
        Forbidden, NotFound, and Cold where it must be loaded first. For any thread.
        """
        found = call.acquired.get(name)
        if found is not None:
            return found
        access, registry = call.access, self.registry
        if access is not None and access.restricted:
            access.check(name)
        chosen = version or (registry.splits.version(name) if name in registry.splits else "")
        found = self.pipeline.loaded(name, chosen)
        if found is None:
            delta = registry.find(name, version, access.allows if access else lambda _: True)
            found = self.pipeline.loaded(name, delta.version)
        if found is None:
            raise Cold(name, version)
        if registry.tiers.bounded:
            registry.tiers.touch((name,))
        call.acquired[name] = found
        return found

    async def _warm(self, call: CallContext, asked: dict[str, str | None]) -> None:
        """Acquires deltas of which some are cold; leased, so that none leaves before the call is answered."""
        call.leases = call.leases or ExitStack()
        call.leases.enter_context(self.registry.tiers.lease(asked))
        await self.lifecycle.warm(list(asked), self._seconds(call), call.started)
        for name, version in asked.items():
            self.acquire(call, name, version)

    def _seconds(self, call: CallContext) -> float:
        return min(call.seconds, self.config.batching.max_call_seconds)

    async def answer(self, call: CallContext, requests: Sequence[Request]) -> list[Prediction]:
        """The answers of one call, in order.

        Raises what is wrong with the first bad request (DataError, NotFound, LimitError), what charging raises, or
        Overloaded; ClientGone where the caller has left; Expired where the answer takes longer than the call, or the
        configuration, allows.
        """
        assert self._loop is not None, "start() comes first"
        if not requests:
            raise DataError("the call holds no items; expected at least one")
        asked = {request.delta: request.version or None for request in requests}
        self._check_room(requests)
        characters = check_sizes(requests, self.config.limits.max_items, self.config.limits.max_text_characters)
        try:
            for name, version in asked.items():
                self.acquire(call, name, version)
        except Cold:
            await self._warm(call, asked)
        deadline = call.started + self._seconds(call)
        items = [CallItem(one, call.acquired[one.delta], call, deadline, call.priority) for one in requests]
        try:
            await self.aside(characters, lambda: self._tokenise(call, items))
            most = self.queue.times.budget
            parts = items if call.tokens <= most else [part for item in items for part in item.parts(most)]
            await self._computed(call, parts, deadline)
        finally:  # what knows the call, or each other, would hold deltas until a garbage collection
            call.items = []
            for item in items:
                item.twins = ()
        answers = list[Prediction]()
        for part in parts:
            if not isinstance(part.outcome, Prediction):
                self._finished(parts, outcomes.FAILED)
                raise taken(parts, part)
            answers.append(part.outcome)
        if len(parts) > len(items):
            groups = [list(own) for _, own in groupby(parts, key=attrgetter("whole"))]
            answers = await self.aside(call.tokens, lambda: list(map(joined, groups)))
        self._finished(parts, outcomes.ANSWERED)
        return answers

    async def _shadowed(self, requests: Sequence[Request]) -> list[Prediction]:
        call = CallContext(priority=LAST)
        try:
            return await self.answer(call, requests)
        finally:
            call.close()

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
        counts = dict[str, int]()
        for request in requests:
            counts[request.delta] = counts.get(request.delta, 0) + 1
        try:
            self.queue.check(counts)
        except Overloaded:
            self.metrics.refused({name: count for name, count in counts.items() if self.pipeline.loaded(name)})
            raise

    def _tokenise(self, call: CallContext, items: Sequence[CallItem]) -> None:
        """Tokenises, up to the first item that is too long, or too much for a queue that were empty."""
        costs, most_tokens = dict[str, int](), self.config.limits.max_item_tokens
        bounds = self.config.batching.max_queue_tokens, self.config.batching.max_delta_tokens
        call.tokens, twins = 0, Twins(self.pipeline.encoder.depth) if len(items) > 1 else None
        for item in items:
            self.pipeline.tokenise(item)
            if item.cost > most_tokens:
                raise LimitError(
                    f"{item.request.where}: {item.cost} tokens, all windows or choices together; at most "
                    f"{most_tokens} are taken, send a shorter text"
                )
            if twins is not None:
                twins.add(item)
            call.tokens += item.charged
            costs[item.delta] = own = costs.get(item.delta, 0) + item.charged
            for cost, most, where in zip((call.tokens, own), bounds, ("", " for one delta"), strict=True):
                if cost > most:
                    raise LimitError(
                        f"the call holds {cost} tokens{where} or more; at most {most} are taken, send several"
                    )

    async def _computed(self, call: CallContext, items: list[CallItem], deadline: float) -> None:
        """Queues the items and waits until each has an outcome."""
        loop = asyncio.get_running_loop()
        access, done = call.access, loop.create_future()
        call.items, call.done, call.unanswered = items, done, len(items)
        timer = loop.call_later(deadline - time.monotonic(), call.fail, Expired())
        end = call.watch(partial(call.fail, ClientGone())) if call.watch else None
        try:
            self._queued(items, access.charge if access and access.metered else None)
            await done
        except (asyncio.CancelledError, ClientGone):
            self._cancel(items, outcomes.DROPPED)
            raise
        except Expired:
            self._cancel(items, outcomes.EXPIRED)
            seconds = self._seconds(call)
            raise Expired(f"no answer within {seconds:g} s; send less, later, or allow more time") from None
        finally:
            timer.cancel()
            if end is not None:
                end()

    def _queued(self, items: list[CallItem], charge: Callable[[int], None] | None) -> None:
        try:
            self.queue.put(items, charge)
        except Exception:
            self._finished(items, outcomes.REFUSED)
            raise

    def _cancel(self, items: Sequence[CallItem], outcome: str) -> None:
        self.queue.cancel(items)
        self._finished(items, outcome)

    def _finished(self, items: Sequence[CallItem], outcome: str) -> None:
        parted = any([isinstance(item, CallPart) for item in items])
        self.metrics.finished(wholes(items) if parted else items, outcome, time.monotonic())

    def _deliver(self, batch: Sequence[CallItem], found: Sequence[Outcome]) -> None:
        """Hands outcomes over to the event loop, one wake-up a batch. In the executor's thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(resolve, batch, found)
        except RuntimeError:  # the loop has closed: nobody is left to be answered
            log.warning("%d answers came after the server had stopped", len(batch))


def taken(parts: Sequence[CallItem], failed: CallItem) -> Exception:
    """The error of the one that failed, which no part knows any more: an error knows all frames that it passes."""
    problem = failed.outcome
    for part in parts:
        part.outcome = None
    return problem if isinstance(problem, Exception) else RuntimeError("an item has no outcome")


def size_of(found: Sequence[Prediction]) -> int:
    """How much there is to write, about as much work as to read so many characters."""
    large = ("embedding", "scores", "sparse")
    rows = [len(value) for one in found for name in large if (value := one.answer.get(name)) is not None]
    return 20 * len(found) + sum(rows) + sum(len(row) for one in found for row in one.answer.get("vectors", ()))
