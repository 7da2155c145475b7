"""Opens the backbone, here or in a process of its own, and gives back the memory that only a start needs."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from bertology_serve.encoder.delta_set import DeltaSet
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import SpecError
from bertology_serve.serving.execution.engine_choice import EngineConfig, apply
from bertology_serve.serving.execution.executor_handle import ForkServer, WorkerPlace
from bertology_serve.serving.execution.remote import Remote
from bertology_serve.serving.observability.background import Background

Executor = Literal["thread", "process"]


@dataclass(frozen=True)
class Startup:
    """``settle`` says what runs the batches, once there are deltas: the engine's name, and what was found; ``warmed``
    that batches now take what they should; ``close`` gives everything back.
    """

    pipeline: DeltaSet
    device: str
    settle: Callable[[EngineConfig], tuple[str, EngineConfig]]
    warmed: Callable[[float], None] = lambda seconds: None
    close: Callable[[], None] = lambda: None


def open_backbone(
    backbone: str,
    device: str,
    dtype: torch.dtype,
    nursery: ForkServer | None = None,
    background: Background | None = None,
    executors: int = 1,
) -> Startup:
    """An encoder without deltas: loaded here, or with a ``nursery`` the one that it has loaded, in ``executors``."""
    if nursery is not None:
        remote = Remote(nursery, backbone, places(device, executors), dtype, background)
        return Startup(remote, device, remote.settle, remote.patience, remote.close)
    pipeline = Pipeline(Encoder.load(backbone, device=device, dtype=dtype, light=True))
    return Startup(pipeline, device, partial(apply, pipeline))


def places(device: str, executors: int) -> list[WorkerPlace]:
    """Where that many executors run: on a GPU each, from that one on, or on their shares of threads and cores.

    SpecError where there are not so many.
    """
    threads = torch.get_num_threads()
    if executors == 1:
        return [WorkerPlace(device, threads)]
    kind, _, first = device.partition(":")
    if kind == "cuda":
        numbers = range(int(first or 0), int(first or 0) + executors)
        if torch.cuda.device_count() < numbers.stop:
            raise SpecError(f"--executors {executors} from {device} on: there are {torch.cuda.device_count()} GPUs")
        return [WorkerPlace(f"cuda:{number}", threads) for number in numbers]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if executors > len(cores):
        raise SpecError(f"--executors {executors}: there are {len(cores)} cores, and each needs one")
    shares = [cores[len(cores) * n // executors : len(cores) * (n + 1) // executors] for n in range(executors)]
    return [WorkerPlace(device, max(1, threads // executors), tuple(share)) for share in shares]


_MAPS = Path("/proc/self/smaps")
_FILE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ \S+ +/(?!dev/)")  # mapped by this process for itself
_DONTNEED = 4  # of madvise(2)


def settle_memory() -> None:
    """Keeps the garbage collector from what is there now, for a process that only serves, or forks, from here on.

    Torch and its models are hundreds of thousands of objects; looking at all of them stops every call meanwhile, and
    copies what forked processes share. What loading has left behind goes back to the system, where the C library can
    do that; so do the pages of files that are as the files are, weights that were packed or checked and code that only
    a start needs: who reads them again has them back from the page cache.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # a full one comes when there is a quarter more than at the last: let that not count what is frozen
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        for start, end in _unchanged():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _unchanged() -> Iterator[tuple[int, int]]:
    """First and last address of every mapped file of which nothing was changed in memory. Linux."""
    mapped: re.Match[str] | None = None
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        if line[0] in "0123456789abcdef":
            mapped = _FILE.match(line)
        elif mapped and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield int(mapped[1], 16), int(mapped[2], 16)
