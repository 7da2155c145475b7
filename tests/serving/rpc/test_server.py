from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from bertology_serve.errors import InputError, Unsupported
from bertology_serve.serving.config import LimitsConfig, ServerConfig
from bertology_serve.serving.grpc_port import GrpcServer
from bertology_serve.serving.server import Server


@pytest.mark.parametrize("absent", ["grpc", "grpc.aio", "google.protobuf"])
def test_without_its_package_it_says_what_to_install(registry, monkeypatch, absent):
    for loaded in [name for name in sys.modules if name.endswith((".grpc_server", ".grpc_port", ".grpc_messages"))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(Unsupported, match=r"pip install 'bertology-serve\[grpc\]'"):
        Server(registry, ServerConfig.of(grpc_port=0))


def test_a_port_that_is_taken():
    async def start(port: int) -> None:
        await GrpcServer("127.0.0.1", port, (), LimitsConfig()).start()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot listen on .* for gRPC; choose another port"):
            asyncio.run(start(taken.getsockname()[1]))
