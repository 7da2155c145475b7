"""Two processes of one run: this one leads, and a fork of it follows."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bertology_serve.training.processes import Processes, join


def run(work: Callable[[Processes], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``work`` gives here, where another process does the same as the second of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**shared, "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of its parent's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says that a fork leaves threads behind
        follower = os.fork()
    if not follower:
        _follow(work)
    try:
        return work(join("cpu")[0])
    finally:
        _leave()
        torch.set_num_threads(threads)
        assert os.waitpid(follower, 0)[1] == 0, "the second process failed"


def _follow(work: Callable[[Processes], Any]) -> None:
    try:
        os.environ.update({"RANK": "1", "LOCAL_RANK": "1"})
        work(join("cpu")[0])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _leave() -> None:
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    PartialState._reset_state()
