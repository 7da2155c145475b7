from __future__ import annotations

import logging
import sys

import pytest

from bertology_serve.errors import NotFound
from bertology_serve.serving.execution import executor_handle
from bertology_serve.serving.execution.channel import Lost
from bertology_serve.serving.execution.executor_handle import ForkServer, WorkerOptions, WorkerPlace

# A fork server that loads nothing: it says what it is, then forks processes that do nothing
STAND_IN = """
import os, socket, sys
from bertology_serve.serving.execution.channel import Channel, Op
control = socket.socket(fileno=int(sys.argv[1]))
channel = Channel(control)
channel.send(Op.DONE, {"hidden": 8})
word, given, _, _ = socket.recv_fds(control, 4096, 8)
if word:
    assert len(given) == 6, given
    channel.send(Op.DONE, {"pid": os.getpid()})
    socket.socket(fileno=given[0]).recv(1)
"""


@pytest.fixture
def nursery(monkeypatch):
    """Ends once its only fork has been closed."""
    monkeypatch.setattr(executor_handle, "COMMAND", (sys.executable, "-c", STAND_IN))
    with ForkServer(WorkerOptions("none")) as made:
        yield made


def test_a_fork_server_that_has_ended_is_started_again(nursery, caplog):
    assert nursery.outline() == {"hidden": 8}
    first = nursery.fork(WorkerPlace("cpu", 1))
    first.close()
    nursery._process.wait(20)
    with caplog.at_level(logging.WARNING):
        second = nursery.fork(WorkerPlace("cpu", 1))
    assert "starting another" in caplog.text
    assert second.pid == nursery._process.pid != first.pid
    second.kill()
    second.outlive()
    second.close()


def test_one_that_does_not_start(monkeypatch):
    monkeypatch.setattr(executor_handle, "COMMAND", (sys.executable, "-c", "pass"))
    with ForkServer(WorkerOptions("none")) as made, pytest.raises(Lost):
        made.outline()


def test_what_is_wrong_with_the_encoder(monkeypatch):
    raising = STAND_IN.replace('Op.DONE, {"hidden": 8}', 'Op.FAULT, {"kind": "NotFound", "message": "no encoder"}')
    monkeypatch.setattr(executor_handle, "COMMAND", (sys.executable, "-c", raising))
    with ForkServer(WorkerOptions("none")) as made, pytest.raises(NotFound, match="no encoder"):
        made.outline()
