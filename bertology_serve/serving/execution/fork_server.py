"""The executor's side: a process that has everything loaded forks executors, which read deltas and run batches.

The fork server, which is run as a module, does nothing but fork. Threads do not survive that, so it has none: torch
runs on one thread there, the weights are laid out and engines made by the executors themselves. Weights are shared with
them until somebody writes, which nobody does.

An executor holds no text, no tokenizer's work and no caller, and ends when the server's end of its channels closes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import LoadedDelta, Pipeline
from bertology_serve.errors import BertologyError, FormatError, NotFound
from bertology_serve.files import JsonObject
from bertology_serve.serving.execution.channel import (
    Body,
    Channel,
    Lost,
    Op,
    SharedMemory,
    fault,
    put_outputs,
    take_batch,
)
from bertology_serve.serving.execution.engine_choice import EngineConfig, apply
from bertology_serve.serving.execution.executor_handle import WorkerOptions, WorkerPlace
from bertology_serve.serving.execution.startup import settle_memory
from bertology_serve.serving.observability import logs
from bertology_serve.serving.observability.logs import place_of
from bertology_serve.serving.versions.cards import card_of, to_record

log = logging.getLogger(__name__)


class Worker:
    """Answers frames. Channels are served each by a thread of its own, so that no batch waits for a disk.

    ``_kept`` are the deltas that were read, by the server's number for them, for as long as it wants them.
    """

    def __init__(self, pipeline: Pipeline, inputs: SharedMemory, outputs: SharedMemory) -> None:
        self.pipeline, self._inputs, self._outputs = pipeline, inputs, outputs
        self._kept: dict[int, Delta] = {}
        self._ready: dict[str, LoadedDelta] = {}
        self._doing: dict[Op, Callable[[Body], JsonObject]] = {
            Op.READ: self.read,
            Op.ADMIT: self.admit,
            Op.FREE: self.free,
            Op.RUN: self.run,
            Op.SETTLE: self.settle,
            Op.HELLO: lambda body: {},
        }

    def serve(self, channel: Channel) -> None:
        try:
            while True:
                channel.send(*self.answer(*channel.receive()))
        except Lost:
            return

    def answer(self, op: Op, body: Body) -> tuple[Op, JsonObject]:
        try:
            return Op.DONE, self._doing[op](body)
        except Lost:
            raise
        except BertologyError as problem:
            return Op.FAULT, fault(problem)
        except Exception as problem:
            log.error("%s raised %s", op.name, place_of(problem))
            return Op.FAULT, {"kind": "", "message": f"the executor raised {place_of(problem)}"}

    def read(self, body: Body) -> JsonObject:
        """Reads and keeps a delta; its card, and the bytes that it takes once it is resident."""
        self._let_go(body)
        path = Path(body["path"])
        delta = self._kept[body["number"]] = self.pipeline.read(path, body["name"])
        return {"card": to_record(card_of(delta, path)), "resident": self.pipeline.resident_bytes(delta)}

    def admit(self, body: Body) -> JsonObject:
        """Makes a delta resident, read again where it is not kept; how many rows its prompt adds to a sequence."""
        self._let_go(body)
        delta = self._kept.get(body["number"])
        if delta is None:
            delta = self.pipeline.read(Path(body["path"]), body["name"])
            if delta.version != body["version"]:
                raise FormatError(f"{body['path']} holds version {delta.version!r}; expected {body['version']!r}")
            self._kept[body["number"]] = delta
        ready = self._ready[body["key"]] = self.pipeline.admit(body["key"], delta)
        return {"prompt": ready.entry.prompt_length, "lowest": ready.entry.lowest}

    def free(self, body: Body) -> JsonObject:
        self._let_go(body)
        with self.pipeline.encoder.lock:
            self._ready.pop(body["key"], None)
            self.pipeline.free(body["key"])
        return {}

    def run(self, body: Body) -> JsonObject:
        hidden = self.pipeline.encoder.hidden
        found = [(self._found(key), rows) for key, rows in body["keys"]]
        readies = [ready.every_token(hidden) if rows else ready for ready, rows in found]
        owned = [(readies[owner], tokens) for owner, tokens in take_batch(self._inputs, *body["sizes"])]
        with self.pipeline.encoder.lock, torch.inference_mode():
            outputs = self.pipeline.outputs(owned)
        return {"numbers": put_outputs(self._outputs, outputs)}

    def settle(self, body: Body) -> JsonObject:
        with self.pipeline.encoder.lock:
            name, found = apply(self.pipeline, msgspec.convert(body["setting"], EngineConfig))
        settle_memory()
        return {"name": name, "setting": asdict(found)}

    def _found(self, key: str) -> LoadedDelta:
        ready = self._ready.get(key) if key else self.pipeline.base
        if ready is None:
            raise NotFound(f"delta {key.partition('#')[0]!r} did not come back after a restart; load it again")
        return ready

    def _let_go(self, body: Body) -> None:
        for number in body.get("unreferenced", ()):
            self._kept.pop(number, None)


def work(
    pipeline: Pipeline, batches: Channel, others: Sequence[Channel], inputs: SharedMemory, outputs: SharedMemory
) -> None:
    """Serves until the server is gone, then ends this process at once.

    A channel whose thread fails ends it too: the server would wait there, and it replaces an executor that has ended.
    """
    worker = Worker(pipeline, inputs, outputs)

    def serve(channel: Channel) -> None:
        try:
            worker.serve(channel)
        except BaseException as problem:
            log.error("the executor ends: %s", place_of(problem))
            os._exit(1)

    for channel in others:
        threading.Thread(target=serve, args=(channel,), daemon=True).start()
    serve(batches)
    os._exit(0)


LONGEST = 4096  # bytes of a place
DESCRIPTORS = 6  # channels for batches, for life, two for loading; shared memory for inputs and outputs


def main(descriptor: int, plan: WorkerOptions) -> None:
    """Loads the encoder, says what it is, then forks whenever it is asked, until the server's end closes."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # meant for the server, which ends this one when it has drained
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries executors; the server sees them end
    logs.set_up(plan.log_level, plan.log_format)
    torch.set_num_threads(1)
    control = socket.socket(fileno=descriptor)
    channel = Channel(control)
    try:
        encoder = Encoder.load(plan.backbone, dtype=getattr(torch, plan.dtype), light=True)
    except BertologyError as problem:
        channel.send(Op.FAULT, fault(problem))
        return
    channel.send(Op.DONE, outline_of(encoder))
    settle_memory()
    while True:
        word, descriptors, _, _ = socket.recv_fds(control, LONGEST, DESCRIPTORS)
        if not word:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            _become_worker(encoder, msgspec.json.decode(word, type=WorkerPlace), descriptors)
        for one in descriptors:
            os.close(one)
        channel.send(Op.DONE, {"pid": pid})


def outline_of(encoder: Encoder) -> dict[str, object]:
    """What the server need know of an encoder."""
    return {
        "ref": asdict(encoder.ref),
        "hidden": encoder.anatomy.hidden,
        "depth": encoder.depth,
        "max_tokens": encoder.max_tokens,
        "is_pruned": encoder.is_pruned,
        "base_task": asdict(encoder.base_task),
        "refusal": encoder.refusal,
        "packing": encoder.packing,
    }


def _become_worker(encoder: Encoder, place: WorkerPlace, descriptors: list[int]) -> None:
    """In the forked process; does not return."""
    try:
        torch.set_num_threads(place.threads)
        if place.cores:
            os.sched_setaffinity(0, place.cores)
        encoder.model.to(torch.device(place.device))
        batches, _, *others = (Channel(socket.socket(fileno=one)) for one in descriptors[:-2])
        inputs, outputs = (SharedMemory(one) for one in descriptors[-2:])
        work(Pipeline(encoder), batches, others, inputs, outputs)
    except Lost:
        os._exit(0)
    except BaseException as problem:
        log.error("the executor could not start: %s: %s", type(problem).__name__, problem)
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=WorkerOptions))
