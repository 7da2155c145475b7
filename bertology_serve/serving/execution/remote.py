"""The deltas of executors in processes of their own: the server has everything about them but their tensors."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from bertology_serve.deltas.delta import BaseRef, Delta
from bertology_serve.deltas.safe_io import build
from bertology_serve.encoder.bank import PROMPT, BankEntry
from bertology_serve.encoder.delta_set import DeltaSet, LoadedDelta
from bertology_serve.encoder.loading import load_tokenizer, locate
from bertology_serve.errors import BertologyError, Crashed, LimitError, Unsupported
from bertology_serve.files import JsonObject
from bertology_serve.kernels.segments import RowSegment
from bertology_serve.serving.execution.channel import Lost, Op, put_batch, take_outputs
from bertology_serve.serving.execution.engine_choice import EngineConfig
from bertology_serve.serving.execution.executor_handle import ExecutorHandle, ForkServer, Supervisor, WorkerPlace
from bertology_serve.serving.observability.background import Background
from bertology_serve.serving.versions.cards import ServedDelta, from_record
from bertology_serve.tasks.heads import Head
from bertology_serve.tasks.registry import task_for
from bertology_serve.tasks.spec import Encoding, TaskSpec

log = logging.getLogger(__name__)
LOAD_SECONDS = 30.0  # for which a delta to be loaded waits for an executor
PAUSE = 0.005  # seconds between two looks for an executor that can run a batch
START_SECONDS = 120.0  # after which one that was forked will not answer


class Outline:
    """What is known of an encoder that so many other processes run, each a batch at a time."""

    def __init__(self, name: str, tokenizer: Any, dtype: torch.dtype, known: JsonObject, parallel: int = 1) -> None:
        self.name, self.tokenizer, self.dtype = name, tokenizer, dtype
        self.ref, self.hidden, self.depth = BaseRef(**known["ref"]), int(known["hidden"]), int(known["depth"])
        self.max_tokens, self.is_pruned = int(known["max_tokens"]), bool(known["is_pruned"])
        self.packing = str(known["packing"])
        self.base_task, self.refusal = build(TaskSpec, known["base_task"], "the outline"), str(known["refusal"])
        self.lock = threading.RLock() if parallel == 1 else threading.Semaphore(parallel)

    def check_length(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise LimitError(f"max_length is {tokens}; {self.name} reads at most {self.max_tokens} tokens")


class Remote(DeltaSet):
    """Deltas whose rows lie in other processes. What those should hold is known here, so that the next ones can.

    There is an executor at each of ``places``. All of them hold every delta, so that any runs any batch: nothing waits
    for one while another is idle, and where one has ended the others go on. Batches that one died of raise Crashed.
    """

    encoder: Outline

    def __init__(
        self,
        nursery: ForkServer,
        backbone: str,
        places: Sequence[WorkerPlace] = (),
        dtype: torch.dtype = torch.float32,
        background: Background | None = None,
    ) -> None:
        places = places or [WorkerPlace("cpu", torch.get_num_threads())]
        tokenizer = load_tokenizer(locate(backbone))  # while the nursery reads the weights
        super().__init__(Outline(backbone, tokenizer, dtype, nursery.outline(), len(places)))
        self._numbers = itertools.count()
        self._held: dict[str, ServedDelta] = {}
        self._setting: EngineConfig | None = None
        self._patience: float | None = None
        self._idle, self._freeing = queue.SimpleQueue[Supervisor](), threading.Lock()
        self.supervisors = [Supervisor(nursery, place, self._restore, background) for place in places]
        for number, one in enumerate(self.supervisors, 1):
            one.start(f"supervisor {number}" if number > 1 else "supervisor")
            self._idle.put(one)

    @property
    def parallel(self) -> int:
        return len(self.supervisors)

    @property
    def is_up(self) -> bool:
        return any(one.is_up for one in self.supervisors)

    @property
    def restarts(self) -> int:
        return sum(one.restarts for one in self.supervisors)

    def settle(self, setting: EngineConfig) -> tuple[str, EngineConfig]:
        """Says what runs the batches, of these executors and of those after them; the engine's name, and what was
        found by the first.
        """
        first, *others = self.supervisors
        answer = self._load(first, Op.SETTLE, {"setting": asdict(setting)})
        self._setting = msgspec.convert(answer["setting"], EngineConfig)
        for one in others:
            self._load(one, Op.SETTLE, {"setting": asdict(self._setting)})
        return answer["name"], self._setting

    def read(self, path: Path, name: str) -> Delta:
        """Has a delta read by the first executor; what is kept here is its card."""
        number = next(self._numbers)
        try:
            answer = self._load(self.supervisors[0], Op.READ, {"path": str(path), "name": name, "number": number})
            card = from_record(answer["card"], number, int(answer["resident"]))
        except BaseException:
            self._let_go(number)
            raise
        weakref.finalize(card, self._let_go, number)
        return card

    def resident_bytes(self, delta: Delta) -> int:
        """What the executor said when it had read the delta."""
        return delta.resident if isinstance(delta, ServedDelta) and delta.number >= 0 else delta.bytes

    def admit(self, key: str, delta: Delta) -> LoadedDelta:
        if not isinstance(delta, ServedDelta) or delta.number < 0:
            raise Unsupported(f"delta {delta.name!r} is in this process; the executor reads its own from disk")
        self.check(delta)
        self._held[key] = delta  # before it is there: an executor that comes meanwhile has it too
        try:
            answer, *_ = [self._load(one, Op.ADMIT, _told(key, delta)) for one in self.supervisors]
        except BaseException:  # whatever it is, nobody will ask for that key; ``add`` has its rows freed
            self._held.pop(key)
            raise
        prompt, lowest = int(answer["prompt"]), int(answer["lowest"])
        entry = BankEntry(key, {PROMPT: RowSegment(0, 0, 0, prompt)} if prompt else {}, lowest=lowest)
        return LoadedDelta(delta, task_for(delta.task), Head(()), entry)

    def free(self, key: str) -> None:
        """Has the rows freed, over the channels of batches, which wait for no disk."""
        self._held.pop(key, None)
        for one in self.supervisors:
            line = one.line()
            try:
                line.batches.ask(Op.FREE, {"key": key, "unreferenced": one.forgotten()})
            except Lost:
                one.lost(line)  # the next one will not hold it

    def free_rows(self) -> None:
        with self._freeing:
            super().free_rows()

    def outputs(self, owned: Sequence[tuple[LoadedDelta, Encoding]]) -> list[Tensor]:
        """One pass of an executor that is idle. Raises Crashed where it did not live to answer."""
        own = [(ready.entry.key, ready.whole is not None) for ready, _ in owned]
        numbers = {key: n for n, key in enumerate(dict.fromkeys(own))}
        with self._taken() as one:
            line = one.line()
            try:
                tokens = [(numbers[key], encoding) for key, (_, encoding) in zip(own, owned, strict=True)]
                sizes = put_batch(line.inputs, tokens)
                answer = line.batches.ask(Op.RUN, {"keys": list(numbers), "sizes": sizes})
                expected = [(ready.delta, encoding) for ready, encoding in owned]
                return take_outputs(line.outputs, int(answer["numbers"]), expected, self.encoder.hidden)
            except Lost as problem:
                one.lost(line)
                raise Crashed(f"the executor ended while it ran a batch ({problem}); try again in 1 s") from None

    @contextmanager
    def _taken(self) -> Iterator[Supervisor]:
        """That of an executor that is idle; of one that has ended only where all have."""
        one = self._idle.get()
        while self.is_up and not one.is_up:
            self._idle.put(one)
            time.sleep(PAUSE)  # it comes back, or another is idle first
            one = self._idle.get()
        try:
            yield one
        finally:
            self._idle.put(one)

    def patience(self, seconds: float) -> None:
        """A batch that takes longer than this has hung from now on, and its executor is replaced."""
        self._patience = seconds
        for one in self.supervisors:
            one.line().batches.patience = seconds

    def close(self) -> None:
        for one in self.supervisors:
            one.close()

    def _load(self, one: Supervisor, op: Op, body: JsonObject) -> JsonObject:
        """An answer that may take its time; asked again of the next executor where one does not live to give it."""
        for _ in range(2):
            line = one.line(LOAD_SECONDS)
            try:
                return line.load(op, body | {"unreferenced": one.forgotten()})
            except Lost as problem:
                one.lost(line)
                why = problem
        raise Crashed(f"the executor ended twice over this ({op.name.lower()}: {why}); try again in 5 s", 5.0)

    def _restore(self, line: ExecutorHandle) -> None:
        """Tells a new executor what the last one knew; raises Lost."""
        line.batches.patience = START_SECONDS
        line.batches.ask(Op.HELLO, {})
        line.batches.patience = self._patience
        for key, card in list(self._held.items()):
            try:
                line.load(Op.ADMIT, _told(key, card))
            except (BertologyError, RuntimeError) as problem:
                log.error("delta %s did not come back: %s", card.name, problem)
                self._lose(key)
        if self._setting is not None:
            line.load(Op.SETTLE, {"setting": asdict(self._setting)})

    def _lose(self, key: str) -> None:
        """A delta that is not over there answers no more; where it is registered, its next call reads it again."""
        self._held.pop(key, None)
        for name, ready in list(self._ready.items()):
            if ready.entry.key == key:
                self.evict(name)

    def _let_go(self, number: int) -> None:
        """Nobody refers to the delta of that number any more."""
        for one in self.supervisors:
            one.unreferenced.append(number)


def _told(key: str, card: ServedDelta) -> JsonObject:
    """What the executor needs to make a delta resident, whether or not it still has it."""
    return {"key": key, "number": card.number, "path": str(card.path), "name": card.name, "version": card.version}
