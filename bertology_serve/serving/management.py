"""The routes that change what the server serves. Each needs an API key with admin rights."""

from __future__ import annotations

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response

from bertology_serve.serving.gate import access_of
from bertology_serve.serving.http import json_response, read_body
from bertology_serve.serving.lifecycle import READY, UNAVAILABLE, Entry, Lifecycle
from bertology_serve.serving.protocol import repository


class Management:
    """The endpoints of the model repository extension."""

    def __init__(self, lifecycle: Lifecycle, max_body_bytes: int) -> None:
        self.lifecycle, self._most = lifecycle, max_body_bytes

    async def index(self, request: Request) -> Response:
        """POST /v2/repository/index"""
        access_of(request.scope).check_admin()
        ready_only = repository.read_index(await read_body(request, self._most))
        return json_response([asdict(entry) for entry in await self.lifecycle.index(ready_only)])

    async def load(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/load"""
        access_of(request.scope).check_admin()
        version = repository.read_load(await read_body(request, self._most))
        delta = await self.lifecycle.load(request.path_params["delta"], version)
        return json_response(asdict(Entry(delta.name, delta.version, READY)))

    async def unload(self, request: Request) -> Response:
        """POST /v2/repository/models/{delta}/unload"""
        access_of(request.scope).check_admin()
        repository.read_unload(await read_body(request, self._most))
        name = request.path_params["delta"]
        await self.lifecycle.unload(name)
        return json_response(asdict(Entry(name, "", UNAVAILABLE, "unloaded")))
