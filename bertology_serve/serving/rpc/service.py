"""The Open Inference Protocol's gRPC methods: the same rights, limits and answers as over HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import grpc

from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import (
    BertologyError,
    Expired,
    Forbidden,
    InputError,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
    Unsupported,
)
from bertology_serve.serving.answering import Answering, of_one_version, size_of
from bertology_serve.serving.errors import headers_of, message_of
from bertology_serve.serving.faults import place_of
from bertology_serve.serving.gate import id_of
from bertology_serve.serving.keys import Access, Keyring
from bertology_serve.serving.lifecycle import Lifecycle
from bertology_serve.serving.metrics import Metrics
from bertology_serve.serving.protocol import oip, oip_model, repository
from bertology_serve.serving.protocol.bodies import encode
from bertology_serve.serving.rpc import codec
from bertology_serve.serving.rpc.messages import SERVICE, message
from bertology_serve.serving.terms import Terms

log = logging.getLogger(__name__)
Code = grpc.StatusCode
_CODES: tuple[tuple[type[Exception], Any], ...] = (
    (InputError, Code.INVALID_ARGUMENT),
    (Unsupported, Code.INVALID_ARGUMENT),
    (NotFound, Code.NOT_FOUND),
    (Unauthorized, Code.UNAUTHENTICATED),
    (Forbidden, Code.PERMISSION_DENIED),
    (RateLimited, Code.RESOURCE_EXHAUSTED),
    (Overloaded, Code.UNAVAILABLE),
    (Expired, Code.DEADLINE_EXCEEDED),
)
PUBLIC = ("ServerLive", "ServerReady")
Method = Callable[[Any, Access, Any], Awaitable[Any]]


class Service:
    """The methods. Each gets the message, who calls (nobody for public ones) and gRPC's context."""

    def __init__(self, answering: Answering, lifecycle: Lifecycle, metrics: Metrics, keyring: Keyring) -> None:
        self._answering, self._lifecycle, self._metrics, self._keyring = answering, lifecycle, metrics, keyring

    def handler(self) -> Any:
        """What a gRPC server takes."""
        methods = {
            "ServerLive": self.live, "ServerReady": self.ready, "ServerMetadata": self.server,
            "ModelReady": self.model_ready, "ModelMetadata": self.model, "ModelConfig": self.config,
            "ModelInfer": self.infer, "ModelStatistics": self.statistics, "RepositoryIndex": self.index,
            "RepositoryModelLoad": self.load, "RepositoryModelUnload": self.unload,
        }  # fmt: skip
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    self._guarded(name, method), message(f"{name}Request").FromString,
                    message(f"{name}Response").SerializeToString,
                )
                for name, method in methods.items()
            },
        )  # fmt: skip

    def _guarded(self, name: str, method: Method) -> Callable[[Any, Any], Awaitable[Any]]:
        async def run(asked: Any, context: Any) -> Any:
            code, call = Code.OK, (("x-request-id", _request_id(context)),)
            context.set_trailing_metadata(call)
            try:
                return await method(asked, self._access(name, context), context)
            except asyncio.CancelledError:
                code = Code.CANCELLED
                raise
            except Exception as problem:
                code = code_of(problem)
                if not isinstance(problem, BertologyError):
                    log.error("%s raised %s (request %s)", name, place_of(problem), call[0][1])
                retry = headers_of(problem).get("Retry-After")
                trailing = (("retry-after", retry),) if retry else ()
                return await context.abort(code, message_of(problem), call + trailing)
            finally:
                self._metrics.call(code.name)

        return run

    def _access(self, name: str, context: Any) -> Access | Any:
        if name in PUBLIC:
            return None
        pairs = ((key, value.encode() if isinstance(value, str) else value)
                 for key, value in context.invocation_metadata() or ())  # fmt: skip
        access = self._keyring.find((key.encode(), value) for key, value in pairs)
        access.call()
        return access

    async def live(self, asked: Any, access: Access, context: Any) -> Any:
        """Liveness."""
        return message("ServerLiveResponse")(live=True)

    async def ready(self, asked: Any, access: Access, context: Any) -> Any:
        """Readiness."""
        return message("ServerReadyResponse")(ready=self._answering.engine.ready)

    async def server(self, asked: Any, access: Access, context: Any) -> Any:
        """About the server."""
        known = oip_model.server_metadata()
        return message("ServerMetadataResponse")(**known)

    async def model_ready(self, asked: Any, access: Access, context: Any) -> Any:
        """Whether a delta answers; an unknown one is not ready, as NVIDIA's server says."""
        try:
            self._find(access, asked)
        except NotFound:
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=self._answering.engine.ready)

    async def model(self, asked: Any, access: Access, context: Any) -> Any:
        """A delta's tensors."""
        known = oip_model.metadata(self._find(access, asked))
        del known["parameters"]
        return message("ModelMetadataResponse")(**known)

    async def config(self, asked: Any, access: Access, context: Any) -> Any:
        """A delta's configuration."""
        return codec.config(oip_model.config(self._find(access, asked)))

    async def statistics(self, asked: Any, access: Access, context: Any) -> Any:
        """What a delta, or every one, has done."""
        deltas = [self._find(access, asked)] if asked.name else self._answering.visible(access)
        return codec.statistics(self._metrics.statistics.of(deltas)["model_stats"])

    async def infer(self, asked: Any, access: Access, context: Any) -> Any:
        """Answers; the client's deadline is the queue's."""
        engine, size = self._answering.engine, asked.ByteSize()
        request, blobs = await engine.aside(size, lambda: codec.read_infer(asked))
        remaining = context.time_remaining()
        seconds = math.inf if remaining is None else max(remaining, 1e-3)
        find = partial(self._answering.find, access)
        most = engine.config.max_items

        async def answer() -> tuple[oip.InferCall, list[Prediction]]:
            model = find(asked.model_name, asked.model_version or None)
            call = await engine.aside(size, lambda: oip.read_call(request, blobs, model, find, most))
            return call, await self._answering.answer(
                access, call.requests, Terms(seconds=min(seconds, call.seconds), priority=call.priority)
            )

        call, found = await of_one_version(answer)
        return await engine.aside(size_of(found), lambda: codec.write_infer(call, found))

    async def index(self, asked: Any, access: Access, context: Any) -> Any:
        """Every version on disk or in service."""
        access.check_admin()
        entries = [asdict(entry) for entry in await self._lifecycle.index(asked.ready)]
        return message("RepositoryIndexResponse")(models=entries)

    async def load(self, asked: Any, access: Access, context: Any) -> Any:
        """Loads a version, or swaps to it."""
        access.check_admin()
        await self._lifecycle.load(asked.model_name, repository.read_load(_body(asked)))
        return message("RepositoryModelLoadResponse")()

    async def unload(self, asked: Any, access: Access, context: Any) -> Any:
        """Takes a delta away."""
        access.check_admin()
        await self._lifecycle.unload(asked.model_name)
        return message("RepositoryModelUnloadResponse")()

    def _find(self, access: Access, asked: Any) -> Any:
        return self._answering.find(access, asked.name, asked.version or None)


def _request_id(context: Any) -> str:
    """The id of a call, as over HTTP."""
    given = [value for name, value in context.invocation_metadata() or () if name == "x-request-id"]
    return id_of(given[-1].encode() if given else b"").decode()


def code_of(problem: Exception) -> Any:
    """The status of an error, by its place in the tree of ``errors``."""
    return next((code for kind, code in _CODES if isinstance(problem, kind)), Code.INTERNAL)


def _body(asked: Any) -> bytes:
    """The parameters of a load as HTTP's body has them; files are left empty, being refused by name."""
    given = codec.parameters_of(asked.parameters)
    return encode({"parameters": {name: "" if isinstance(value, bytes) else value for name, value in given.items()}})
