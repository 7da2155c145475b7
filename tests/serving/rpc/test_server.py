from __future__ import annotations

import asyncio
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bertology_serve.errors import InputError, Unsupported
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.grpc_server import GrpcServer


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc.aio", None)
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[grpc\]'"):
        GrpcServer("127.0.0.1", 0)


def test_a_port_that_is_taken():
    service: Any = SimpleNamespace(config=ServerConfig(), lifecycle=None, metrics=None)
    nothing: Any = None

    async def start(port: int) -> None:
        await GrpcServer("127.0.0.1", port).start(service, nothing)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot listen on .* for gRPC; choose another --grpc-port"):
            asyncio.run(start(taken.getsockname()[1]))
