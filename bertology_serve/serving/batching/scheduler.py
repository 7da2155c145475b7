"""Which of the waiting items make the next batch: fair between deltas, earliest deadline first within each.

Virtual token counters (VTC; Sheng et al., Fairness in Serving Large Language Models, OSDI 2024), which are exact here:
an encoder's cost is known on arrival. Each delta that waits has a counter of tokens served over its weight; the lowest
goes next, and is charged as it goes. A delta that begins to wait is lifted to the lowest counter of those that wait, so
that idling earns no credit. For any two deltas that wait, the counters differ by at most ``max(cost / weight)`` of one
item; over any time in which both wait, their service over weight differs by at most twice that.

Pure: no clock, no lock, no thread of its own.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum

from torch import Tensor

from bertology_serve.encoder.bank import NEVER
from bertology_serve.encoder.pipeline import Job, LoadedDelta, Prediction, Request
from bertology_serve.encoder.sharing import SharedRows, Text, text_of
from bertology_serve.serving.keys import Access
from bertology_serve.tasks.spec import Encoding

Outcome = Prediction | Exception
DEFAULT_PRIORITY = 5  # of calls that ask for none
DEFAULT_WEIGHT = 1.0


class ItemState(Enum):
    """Where an item is: a batch takes it once, or nobody wants it any more."""

    WAITING = "waiting"
    TAKEN = "taken"
    CANCELLED = "cancelled"


class CallContext:
    """One call: who asks and on what terms, the versions that answer it, and its items. Belongs to the event loop.

    The answer is worth nothing after ``seconds``. Of one delta's items those of the lowest ``priority`` go first (0:
    the default one). ``watch(left)`` has ``left()`` called once the caller has gone, and may give what ends the watch.
    ``acquired`` are the versions, by the name that was asked for: they stay, and stay in memory, until the call is
    answered; ``leases`` keep them from being evicted. ``tokens`` is what was charged, ``started`` when the call came,
    on the clock of ``time.monotonic``.
    """

    def __init__(
        self,
        access: Access | None = None,
        watch: Callable[[Callable[[], None]], Callable[[], object] | None] | None = None,
        seconds: float = math.inf,
        priority: int = 0,
    ) -> None:
        self.access, self.watch, self.seconds, self.priority = access, watch, seconds, priority
        self.acquired: dict[str, LoadedDelta] = {}
        self.items: list[CallItem] = []
        self.tokens, self.started = 0, time.monotonic()
        self.leases: ExitStack | None = None
        self.done: asyncio.Future[None] | None = None
        self.unanswered = 0

    def close(self) -> None:
        """Lets go of its leases, once it is answered."""
        if self.leases is not None:
            self.leases.close()

    def count_down(self) -> None:
        """One more item has its outcome; the last one wakes the call."""
        self.unanswered -= 1
        if not self.unanswered and self.done is not None and not self.done.done():
            self.done.set_result(None)

    def fail(self, problem: Exception) -> None:
        """Wakes the call with an error, unless it has been woken before."""
        if self.done is not None and not self.done.done():
            self.done.set_exception(problem)


class CallItem(Job):
    """One item of a call, from its arrival to its answer: its request, the delta that answers, its tokens, its outcome.

    ``arrived``, ``started`` and ``deadline`` are in seconds of the queue's clock; 0: not yet. ``twins`` are the items
    of the call that ask about the same text, itself among them; ``spared`` are rows, and squares, that they share.
    """

    twins: Sequence[CallItem] = ()
    spared = (0, 0)

    def __init__(
        self, request: Request, ready: LoadedDelta, call: CallContext, deadline: float = math.inf, priority: int = 0
    ) -> None:
        super().__init__(request, ready)
        self.call, self.deadline, self.priority = call, deadline, priority or DEFAULT_PRIORITY
        self.delta, self.version = request.delta, ready.delta.version
        self.arrived, self.started, self.state = 0.0, 0.0, ItemState.WAITING
        self.outcome: Outcome | None = None

    @property
    def whole(self) -> CallItem:
        """The item of the call that this is, or is a part of."""
        return self

    def spare(self, spared: tuple[int, int]) -> None:
        """Says which rows, and squares, of it are computed for others anyway."""
        self.spared, self.charged = spared, self.cost - spared[0]

    def size(self, bend: float, spared: tuple[int, int]) -> float:
        """What it adds to a batch that spares it so much."""
        return self.cost - spared[0] + bend * (self.squares - spared[1])

    def parts(self, most: float) -> Sequence[CallItem]:
        """Itself or, where it costs more, parts of its sequences that batches take one by one."""
        if self.cost <= most or len(self.encodings) < 2:
            return [self]
        groups, rows = list[list[Encoding]](), 0
        for encoding in self.encodings:
            size = len(encoding) + self.ready.prompt_length
            if not groups or rows + size > most:
                groups.append([])
                rows = 0
            groups[-1].append(encoding)
            rows += size
        return [CallPart(self, group) for group in groups]


class CallPart(CallItem):
    """Some windows or choices of an item; once all parts have run, their ``outputs`` make its answer."""

    def __init__(self, whole: CallItem, encodings: Sequence[Encoding]) -> None:
        super().__init__(whole.request, whole.ready, whole.call, whole.deadline, whole.priority)
        self._whole, self.outputs = whole, list[Tensor]()
        self.take(encodings)

    @property
    def whole(self) -> CallItem:
        """The item of the call."""
        return self._whole

    def answered(self, outputs: Sequence[Tensor]) -> Prediction:
        """Keeps the outputs; no answer yet."""
        self.outputs = list(outputs)
        return Prediction(self.delta, self.version, self.ready.delta.task.kind, {})


class Twins:
    """A call's items that ask about the same text."""

    def __init__(self, depth: int) -> None:
        self._shared, self._twins = SharedRows(depth), dict[Text, list[CallItem]]()

    def add(self, item: CallItem) -> None:
        """Tells an item, tokenised, what it shares with those before it, and all of them of each other."""
        item.spare(self._shared.spared(item))
        self._shared.add(item)
        twins = self._twins.setdefault(text_of(item.encodings[0]), [])
        twins.append(item)
        item.twins = twins


def joined(parts: Sequence[CallItem]) -> Prediction:
    """The answer of an item all of whose parts have run."""
    first = parts[0]
    if isinstance(first, CallPart):
        return first.whole.answered([out for part in parts if isinstance(part, CallPart) for out in part.outputs])
    assert isinstance(first.outcome, Prediction)
    return first.outcome


def wholes(parts: Sequence[CallItem]) -> list[CallItem]:
    """The items that these are parts of, which came and began as the first of them did."""
    for part in reversed(parts):
        part.whole.arrived, part.whole.started = part.arrived, part.started
    return list(dict.fromkeys(part.whole for part in parts))


def resolve(items: Sequence[CallItem], outcomes: Sequence[Outcome]) -> None:
    """Gives items their outcomes. On the event loop; an outcome that comes twice is kept once."""
    for item, outcome in zip(items, outcomes, strict=True):
        if item.outcome is None:
            item.outcome = outcome
            item.call.count_down()


_order = itertools.count()


class Waiting:
    """How much waits."""

    __slots__ = ("items", "tokens")

    def __init__(self) -> None:
        self.items = self.tokens = 0

    def add(self, items: int, tokens: int) -> None:
        self.items += items
        self.tokens += tokens


class DeltaQueue:
    """Lowest priority number first, then earliest deadline, then first come.

    ``waiting`` counts what still waits, ``total`` that of all queues together.

    ``counter`` is the service that the delta has had: tokens over ``weight``, on the scheduler's scale.
    """

    __slots__ = ("_heap", "counter", "name", "total", "waiting", "weight")

    def __init__(self, name: str, weight: float, counter: float, total: Waiting) -> None:
        self.name, self.weight, self.counter = name, weight, counter
        self.waiting, self.total = Waiting(), total
        self._heap: list[tuple[int, float, int, CallItem]] = []

    def push(self, item: CallItem) -> None:
        heapq.heappush(self._heap, (item.priority, item.deadline, next(_order), item))
        self._count(1, item.charged)

    def first(self, now: float) -> CallItem | None:
        """The next item, still waiting; ``None`` where there is none. What has expired is cancelled on the way."""
        while self._heap:
            item = self._heap[0][3]
            if item.state is ItemState.WAITING and item.deadline > now:
                return item
            heapq.heappop(self._heap)
            if item.state is ItemState.WAITING:
                item.state = ItemState.CANCELLED
                self._count(-1, -item.charged)
        return None

    def take(self, item: CallItem, spared: tuple[int, int]) -> None:
        """Removes an item that waits, and charges the delta for what the batch does not spare it."""
        item.state = ItemState.TAKEN
        self._count(-1, -item.charged)
        item.spare(spared)
        self.counter += item.charged / self.weight

    def cancel(self, item: CallItem) -> None:
        """Takes out an item that was waiting; it costs the delta nothing."""
        item.state = ItemState.CANCELLED
        self._count(-1, -item.charged)
        if len(self._heap) > 2 * self.waiting.items + 16:
            self._heap = [entry for entry in self._heap if entry[3].state is ItemState.WAITING]
            heapq.heapify(self._heap)

    def _count(self, items: int, tokens: int) -> None:
        self.waiting.add(items, tokens)
        self.total.add(items, tokens)


class Batch:
    """A batch as it grows: ``items``, and what they fill of it."""

    def __init__(self, scheduler: FairScheduler, now: float) -> None:
        self.items: list[CallItem] = []
        self._scheduler, self._now, self._shared = scheduler, now, SharedRows(scheduler.depth)
        self._filled, self._soonest = 0.0, math.inf

    def take(self, queue: DeltaQueue, item: CallItem) -> bool:
        """Takes an item out of its queue, if there is room or it is the first; whether it did."""
        scheduler, spared = self._scheduler, self._shared.spared(item)
        filled, soonest = self._filled + item.size(scheduler.bend, spared), min(self._soonest, item.deadline)
        in_time = self._now + scheduler.seconds(filled) <= soonest
        if self.items and filled > (scheduler.max_tokens if in_time else scheduler.hurried):
            return False
        self._filled, self._soonest = filled, soonest
        queue.take(item, spared)
        self.items.append(item)
        self._shared.add(item)
        return True


class FairScheduler:
    """The order of the queue. ``WorkQueue`` calls it under its lock, with its own clock's time in seconds.

    Batches hold up to ``max_tokens``, of whatever deltas, an item counting as ``cost + bend · squares``, less what it
    shares with others in the batch that ask about the same text; one beyond that goes alone. With an item come its
    twins of the same call, as far as they fit: out of turn, and cheaper than later. A batch ends at the first item that
    does not fit, so that nothing overtakes it. Beyond ``hurried`` tokens it only grows while all in it are answered
    before their deadlines, if it takes ``seconds(size)``. ``weights`` are by delta, 1 for those not named. ``queues``
    are the deltas that wait, ``total`` counts what does; ``depth`` is the number of the encoder's layers.
    """

    def __init__(self, max_tokens: int, weights: Mapping[str, float] | None = None, depth: int = NEVER) -> None:
        self.max_tokens: float = max_tokens
        self.depth = depth
        self.hurried: float = max_tokens
        self.seconds: Callable[[float], float] = lambda size: 0.0
        self.bend = 0.0
        self._weights = dict(weights or {})
        self.total = Waiting()
        self.queues: dict[str, DeltaQueue] = {}
        self._heap: list[tuple[float, int, DeltaQueue]] = []  # a heap over the queues that wait; empty queues are stale
        self._order = itertools.count()
        self._floor = 0.0
        self._spent: dict[str, float] = {}  # counters above the floor of deltas that do not wait now

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Changes some weights; what has been charged stays charged."""
        self._weights.update(weights)
        for name in weights.keys() & self.queues.keys():
            self.queues[name].weight = weights[name]

    def share(self, delta: str) -> float:
        """The part of the service that a delta would get now, beside those that wait."""
        others = sum(queue.weight for name, queue in self.queues.items() if name != delta)
        own = self._weights.get(delta, DEFAULT_WEIGHT)
        return own / (own + others)

    def counters(self) -> dict[str, float]:
        return {name: queue.counter for name, queue in self.queues.items()}

    def push(self, item: CallItem) -> None:
        queue = self.queues.get(item.delta)
        if queue is None:
            queue = self._opened(item.delta)
        queue.push(item)

    def pick(self, now: float) -> list[CallItem]:
        """Removes and returns the next batch, items of any deltas together; empty when nothing waits."""
        batch = Batch(self, now)
        while (queue := self._lowest()) is not None:
            item, counter = queue.first(now), queue.counter
            if item is None:
                continue
            if not batch.take(queue, item):
                break
            self._floor = counter
            for twin in item.twins:
                if twin.state is ItemState.WAITING and twin.deadline > now:
                    batch.take(self.queues[twin.delta], twin)
        for name in {item.delta for item in batch.items}:
            if name in self.queues and not self.queues[name].waiting.items:
                self._closed(self.queues[name])
        return batch.items

    def cancel(self, item: CallItem) -> None:
        queue = self.queues[item.delta]
        queue.cancel(item)
        if not queue.waiting.items:
            self._closed(queue)

    def _opened(self, name: str) -> DeltaQueue:
        """The queue of a delta that begins to wait, lifted to those that wait already."""
        first = self._lowest()
        counter = max(self._spent.pop(name, 0.0), self._floor if first is None else first.counter)
        weight = self._weights.get(name, DEFAULT_WEIGHT)
        queue = self.queues[name] = DeltaQueue(name, weight, counter, self.total)
        heapq.heappush(self._heap, (counter, next(self._order), queue))
        return queue

    def _lowest(self) -> DeltaQueue | None:
        """The queue that waits with the lowest counter; counters have risen since they were put into the heap."""
        while self._heap:
            counter, _, queue = self._heap[0]
            if not queue.waiting.items:
                heapq.heappop(self._heap)
                self._closed(queue)
            elif counter < queue.counter:
                heapq.heapreplace(self._heap, (queue.counter, next(self._order), queue))
            else:
                return queue
        return None

    def _closed(self, queue: DeltaQueue) -> None:
        """Nothing of a delta waits any more. What it has spent beyond the others is remembered while others wait."""
        if self.queues.get(queue.name) is queue:
            del self.queues[queue.name]
            self._spent[queue.name] = queue.counter
        if not self.queues:
            self._spent.clear()
            self._floor = 0.0
        elif len(self._spent) > 2 * len(self.queues) + 64:
            self._spent = {name: spent for name, spent in self._spent.items() if spent > self._floor}
