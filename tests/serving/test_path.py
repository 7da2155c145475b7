"""How far a call goes: the files that it enters, and how often the event loop goes from one to another."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import bertology_serve
from tests.serving.running import running

PACKAGE = str(Path(bertology_serve.__file__).parent)
MOST_FILES, MOST_SWITCHES = 30, 45


@pytest.fixture
def entered() -> Iterator[list[tuple[str, str]]]:
    """(thread, file) of every function of the library that is called, or goes on, in threads that start from now on."""
    seen: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and not frame.f_code.co_qualname.startswith("LoopLag"):
            seen.append((threading.current_thread().name, name.removeprefix(PACKAGE)))

    before = sys.getprofile()
    threading.setprofile(note)
    yield seen
    threading.setprofile(before)


def ask(url: str, body: bytes) -> bytes:
    """Head and body in one packet, so that the call is read at once."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        answer = b""
        while not answer.partition(b"\r\n\r\n")[2].endswith(b"}"):
            answer += connection.recv(65_536)
        return answer


def test_a_call_enters_few_files_and_goes_straight_through_them(entered, pipeline):
    body = json.dumps({"delta": "mood", "text": "the cat was good"}).encode()
    with running(pipeline) as server:
        loop = server.server.service._loop
        assert loop is not None
        for _ in range(2):  # the first one warms up
            ask(server.url, body)
            done = threading.Event()
            loop.call_soon_threadsafe(done.set)
            assert done.wait(60)
            path, entered[:] = list(entered), []
    thread = next(name for name, file in path if file.endswith("connection.py"))
    on_loop = [file for name, file in path if name == thread and not file.endswith("background.py")]
    switches = sum(one != other for one, other in pairwise(on_loop))
    files = {file for _, file in path}
    assert len(files) <= MOST_FILES, " ".join(sorted(files))
    assert switches <= MOST_SWITCHES, "\n".join(b for a, b in zip(["", *on_loop], on_loop, strict=False) if a != b)
