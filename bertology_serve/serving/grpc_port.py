"""A port for gRPC, whatever is answered there; the server's and the router's."""

from __future__ import annotations

import asyncio
import logging

import grpc.aio

from bertology_serve.errors import InputError
from bertology_serve.serving.config import LimitsConfig

log = logging.getLogger(__name__)


class GrpcServer:
    """Opens ``port`` of ``host`` (0: a free one) at ``start``, for calls that ``handlers`` answer.

    ``port`` is then the one that was taken.
    """

    def __init__(self, host: str, port: int, handlers: tuple[object, ...], limits: LimitsConfig) -> None:
        self.host, self.port, self._handlers, self._limits = host, port, handlers, limits

    async def start(self) -> None:
        """InputError where the port cannot be had."""
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", self._limits.max_body_bytes + self._limits.max_header_bytes),
                ("grpc.max_metadata_size", self._limits.max_header_bytes),
                ("grpc.so_reuseport", 0),
            )
        )
        self._server.add_generic_rpc_handlers(self._handlers)
        where = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        try:
            self.port = self._server.add_insecure_port(where)
        except RuntimeError:
            raise InputError(f"cannot listen on {where} for gRPC; choose another port for it") from None
        await self._server.start()
        log.info("gRPC on port %d", self.port)

    async def stop(self, seconds: float) -> None:
        """Takes no more calls and waits for those under way."""
        await asyncio.shield(self._server.stop(seconds))
        del self._server  # it has an end of its own, which should come now and not in whatever collects garbage
