"""The executor's process: backbone, delta bank and engine. It reads deltas and runs batches as it is told.

It holds no text, no tokenizer's work and no caller, and ends when the server's end of its channels closes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import LoadedDelta, Pipeline
from bertology_serve.errors import BertologyError, FormatError, NotFound
from bertology_serve.serving.execution.engine_choice import EngineConfig, apply
from bertology_serve.serving.execution.process.channel import (
    Body,
    Channel,
    Lost,
    Op,
    SharedMemory,
    fault,
    put_outputs,
    take_batch,
)
from bertology_serve.serving.execution.startup import settle_memory
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
        self._doing: dict[Op, Callable[[Body], dict[str, Any]]] = {
            Op.READ: self.read,
            Op.ADMIT: self.admit,
            Op.RELEASE: self.release,
            Op.RUN: self.run,
            Op.SETTLE: self.settle,
            Op.HELLO: lambda body: {},
        }

    def serve(self, channel: Channel) -> None:
        """Answers one channel until it ends."""
        try:
            while True:
                channel.send(*self.answer(*channel.receive()))
        except Lost:
            return

    def answer(self, op: Op, body: Body) -> tuple[Op, dict[str, Any]]:
        """The answer to one frame."""
        try:
            return Op.DONE, self._doing[op](body)
        except Lost:
            raise
        except BertologyError as problem:
            return Op.FAULT, fault(problem)
        except Exception as problem:
            log.error("%s raised %s", op.name, place_of(problem))
            return Op.FAULT, {"kind": "", "message": f"the executor raised {place_of(problem)}"}

    def read(self, body: Body) -> dict[str, Any]:
        """Reads and keeps a delta; its card, and the bytes that it takes once it is resident."""
        self._forget(body)
        path = Path(body["path"])
        delta = self._kept[body["number"]] = self.pipeline.read(path, body["name"])
        return {"card": to_record(card_of(delta, path)), "resident": self.pipeline.resident_bytes(delta)}

    def admit(self, body: Body) -> dict[str, Any]:
        """Makes a delta resident, read again where it is not kept; how many rows its prompt adds to a sequence."""
        self._forget(body)
        delta = self._kept.get(body["number"])
        if delta is None:
            delta = self.pipeline.read(Path(body["path"]), body["name"])
            if delta.version != body["version"]:
                raise FormatError(f"{body['path']} holds version {delta.version!r}; expected {body['version']!r}")
            self._kept[body["number"]] = delta
        ready = self._ready[body["key"]] = self.pipeline.admit(body["key"], delta)
        return {"prompt": ready.entry.prompt_length}

    def release(self, body: Body) -> dict[str, Any]:
        """Frees the rows of a delta."""
        self._forget(body)
        with self.pipeline.encoder.lock:
            self._ready.pop(body["key"], None)
            self.pipeline.release(body["key"])
        return {}

    def run(self, body: Body) -> dict[str, Any]:
        """Runs a batch that lies in shared memory."""
        readies = [self._found(key) for key in body["keys"]]
        owned = [(readies[owner], tokens) for owner, tokens in take_batch(self._inputs, *body["sizes"])]
        with self.pipeline.encoder.lock, torch.inference_mode():
            outputs = self.pipeline.outputs(owned)
        return {"numbers": put_outputs(self._outputs, outputs)}

    def settle(self, body: Body) -> dict[str, Any]:
        """Settles what runs batches."""
        name, found = apply(self.pipeline, msgspec.convert(body["setting"], EngineConfig))
        settle_memory()
        return {"name": name, "setting": asdict(found)}

    def _found(self, key: str) -> LoadedDelta:
        ready = self._ready.get(key) if key else self.pipeline.base
        if ready is None:
            raise NotFound(f"delta {key.partition('#')[0]!r} did not come back after a restart; load it again")
        return ready

    def _forget(self, body: Body) -> None:
        for number in body.get("forget", ()):
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
