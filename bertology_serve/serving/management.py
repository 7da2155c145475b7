"""The routes that change what the server serves. Each needs an API key with admin rights."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.gate import access_of
from bertology_serve.serving.http import json_response, read_body
from bertology_serve.serving.lifecycle import READY, UNAVAILABLE, Entry, Lifecycle
from bertology_serve.serving.protocol import repository


class Management:
    """The endpoints of the model repository extension."""

    def __init__(self, lifecycle: Lifecycle, config: ServerConfig) -> None:
        self.lifecycle, self._config = lifecycle, config

    async def index(self, request: Request) -> Response:
        """POST /v2/repository/index"""
        access_of(request.scope).check_admin()
        ready_only = repository.read_index(await self._body(request))
        return json_response([asdict(entry) for entry in await self.lifecycle.index(ready_only)])

    async def load(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/load"""
        access_of(request.scope).check_admin()
        version = repository.read_load(await self._body(request))
        delta = await self.lifecycle.load(request.path_params["delta"], version)
        return json_response(asdict(Entry(delta.name, delta.version, READY)))

    async def rollback(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/rollback, this project's own"""
        access_of(request.scope).check_admin()
        repository.read_unload(await self._body(request))
        delta = await self.lifecycle.rollback(request.path_params["delta"])
        return json_response(asdict(Entry(delta.name, delta.version, READY)))

    async def unload(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/unload"""
        access_of(request.scope).check_admin()
        repository.read_unload(await self._body(request))
        name = request.path_params["delta"]
        await self.lifecycle.unload(name)
        return json_response(asdict(Entry(name, "", UNAVAILABLE, "unloaded")))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.max_body_seconds)
