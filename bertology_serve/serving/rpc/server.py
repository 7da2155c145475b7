"""The gRPC port beside HTTP, in the same event loop."""

from __future__ import annotations

import asyncio
import logging

from bertology_serve.errors import InputError, Unsupported
from bertology_serve.serving.answering import Answering
from bertology_serve.serving.keys import Keyring
from bertology_serve.serving.lifecycle import Lifecycle
from bertology_serve.serving.metrics import Metrics

log = logging.getLogger(__name__)


class GrpcServer:
    """Opens ``port`` of ``host`` (0: a free one) at ``start``. ``port`` is then the one that was taken.

    Unsupported without the package ``grpcio``; InputError where the port cannot be had.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            import grpc.aio
        except ImportError:
            raise Unsupported("--grpc-port needs grpcio and protobuf: pip install 'bertology-serve[grpc]'") from None
        self.host, self.port = host, port
        self._module = grpc.aio

    async def start(self, answering: Answering, lifecycle: Lifecycle, metrics: Metrics, keyring: Keyring) -> None:
        """Takes calls from now on."""
        from bertology_serve.serving.rpc.service import Service

        config = answering.engine.config
        self._server = self._module.server(
            options=(
                ("grpc.max_receive_message_length", config.max_body_bytes),
                ("grpc.max_metadata_size", config.max_header_bytes),
                ("grpc.so_reuseport", 0),
            )
        )
        self._server.add_generic_rpc_handlers((Service(answering, lifecycle, metrics, keyring).handler(),))
        where = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        try:
            self.port = self._server.add_insecure_port(where)
        except RuntimeError:
            raise InputError(f"cannot listen on {where} for gRPC; choose another --grpc-port") from None
        await self._server.start()
        log.info("gRPC on port %d", self.port)

    async def stop(self, seconds: float) -> None:
        """Takes no more calls and waits for those under way."""
        await asyncio.shield(self._server.stop(seconds))
