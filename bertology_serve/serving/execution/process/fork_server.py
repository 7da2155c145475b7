"""A process that has everything loaded and does nothing but fork executors: run as a module.

Threads do not survive a fork, so it has none: torch runs on one thread here, the weights are laid out and engines made
by the executors themselves. Weights are shared with them until somebody writes, which nobody does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from dataclasses import asdict

import msgspec
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BertologyError
from bertology_serve.serving.execution.process.channel import Channel, Lost, Op, SharedMemory, fault
from bertology_serve.serving.execution.process.executor_handle import WorkerOptions, WorkerPlace
from bertology_serve.serving.execution.process.worker import work
from bertology_serve.serving.execution.startup import settle_memory
from bertology_serve.serving.observability import logs

log = logging.getLogger(__name__)
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
        encoder = Encoder.load(plan.backbone, dtype=getattr(torch, plan.dtype))
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
        "max_tokens": encoder.max_tokens,
        "is_pruned": encoder.is_pruned,
        "packing": encoder.packing,
    }


def _become_worker(encoder: Encoder, place: WorkerPlace, descriptors: list[int]) -> None:
    """In the forked process; does not return."""
    try:
        torch.set_num_threads(place.threads)
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
