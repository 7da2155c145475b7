"""The Open Inference Protocol over gRPC: its methods, and messages to requests and back."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import grpc
import msgspec

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.pipeline import Prediction
from bertology_serve.errors import (
    BertologyError,
    DataError,
    Expired,
    Forbidden,
    InputError,
    NotFound,
    Overloaded,
    RateLimited,
    Unauthorized,
    Unsupported,
)
from bertology_serve.files import JsonMapping, JsonObject
from bertology_serve.serving.batching.scheduler import CallContext
from bertology_serve.serving.http.errors import headers_of, message_of
from bertology_serve.serving.http.request_id import id_of
from bertology_serve.serving.keys import EVERYONE, Access, Keyring
from bertology_serve.serving.observability.logs import place_of
from bertology_serve.serving.protocol import oip, oip_model
from bertology_serve.serving.protocol.grpc_messages import SERVICE, Message, message
from bertology_serve.serving.protocol.json_codec import encode
from bertology_serve.serving.protocol.oip import AskedOutput, InferCall, InferRequest, tensors_of, version_of
from bertology_serve.serving.protocol.oip import parameters_of as response_parameters
from bertology_serve.serving.protocol.tensors import InputTensor
from bertology_serve.serving.service import Find, Service

log = logging.getLogger(__name__)
Code = grpc.StatusCode
_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
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


class Context(Protocol):
    """What gRPC knows of a call."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None: ...

    def time_remaining(self) -> float | None: ...

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Sequence[tuple[str, str]]) -> Message:
        """Ends the call with an error; it raises."""
        ...


Method = Callable[[Message, Access, Context], Awaitable[Message]]


class Methods:
    """The service's methods. Each gets the message, who calls (nobody for public ones) and gRPC's context."""

    def __init__(self, service: Service, keyring: Keyring) -> None:
        self._service, self._keyring = service, keyring
        self._lifecycle, self._metrics = service.lifecycle, service.metrics

    def handler(self) -> object:
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

    def _guarded(self, name: str, method: Method) -> Callable[[Message, Context], Awaitable[Message]]:
        async def run(asked: Message, context: Context) -> Message:
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

    def _access(self, name: str, context: Context) -> Access:
        if name in PUBLIC:
            return EVERYONE
        pairs = ((key, value.encode() if isinstance(value, str) else value)
                 for key, value in context.invocation_metadata() or ())  # fmt: skip
        access = self._keyring.find((key.encode(), value) for key, value in pairs)
        access.call()
        return access

    async def live(self, asked: Message, access: Access, context: Context) -> Message:
        return message("ServerLiveResponse")(live=True)

    async def ready(self, asked: Message, access: Access, context: Context) -> Message:
        return message("ServerReadyResponse")(ready=self._service.ready)

    async def server(self, asked: Message, access: Access, context: Context) -> Message:
        known = oip_model.server_metadata()
        return message("ServerMetadataResponse")(**known)

    async def model_ready(self, asked: Message, access: Access, context: Context) -> Message:
        """Whether a delta answers; an unknown one is not ready, as NVIDIA's server says."""
        try:
            self._find(access, asked)
        except NotFound:
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=self._service.ready)

    async def model(self, asked: Message, access: Access, context: Context) -> Message:
        known = oip_model.metadata(self._find(access, asked))
        del known["parameters"]
        return message("ModelMetadataResponse")(**known)

    async def config(self, asked: Message, access: Access, context: Context) -> Message:
        return config(oip_model.config(self._find(access, asked)))

    async def statistics(self, asked: Message, access: Access, context: Context) -> Message:
        deltas = [self._find(access, asked)] if asked.name else self._service.visible(access)
        return statistics(self._metrics.statistics.of(deltas)["model_stats"])

    async def infer(self, asked: Message, access: Access, context: Context) -> Message:
        """Answers; the client's deadline is the queue's."""
        service, size = self._service, asked.ByteSize()
        request, blobs = await service.aside(size, lambda: read_infer(asked))
        remaining = context.time_remaining()
        call = CallContext(access, seconds=math.inf if remaining is None else max(remaining, 1e-3))

        def read(find: Find) -> InferCall:
            model = find(asked.model_name, asked.model_version or None)
            found = oip.read_call(request, blobs, model, find, service.config.limits.max_items)
            call.seconds, call.priority = min(call.seconds, found.seconds), found.priority
            return found

        response, _ = await service.serve(call, size, read, write_infer)
        return response

    async def index(self, asked: Message, access: Access, context: Context) -> Message:
        access.check_admin()
        entries = [msgspec.structs.asdict(entry) for entry in await self._lifecycle.index(asked.ready)]
        return message("RepositoryIndexResponse")(models=entries)

    async def load(self, asked: Message, access: Access, context: Context) -> Message:
        access.check_admin()
        await self._lifecycle.load(asked.model_name, oip_model.read_load(_body(asked)))
        return message("RepositoryModelLoadResponse")()

    async def unload(self, asked: Message, access: Access, context: Context) -> Message:
        access.check_admin()
        await self._lifecycle.unload(asked.model_name)
        return message("RepositoryModelUnloadResponse")()

    def _find(self, access: Access, asked: Message) -> Delta:
        return self._service.find(access, asked.name, asked.version or None)


def _request_id(context: Context) -> str:
    headers = context.invocation_metadata() or ()
    given = [value for name, value in headers if name == "x-request-id" and isinstance(value, str)]
    return id_of(given[-1].encode() if given else b"").decode()


def code_of(problem: Exception) -> grpc.StatusCode:
    """The status of an error, by its place in the tree of ``errors``."""
    return next((code for kind, code in _CODES if isinstance(problem, kind)), Code.INTERNAL)


def _body(asked: Message) -> bytes:
    """The parameters of a load as HTTP's body has them; files are left empty, being refused by name."""
    given = parameters_of(asked.parameters)
    return encode({"parameters": {name: "" if isinstance(value, bytes) else value for name, value in given.items()}})


_DATA_TYPES = {"TYPE_STRING": 13, "TYPE_FP32": 11, "TYPE_INT64": 9}


def parameters_of(given: JsonMapping) -> JsonObject:
    """A map of ``InferParameter`` as plain values."""
    found = {}
    for name, parameter in given.items():
        which = parameter.WhichOneof("parameter_choice")
        if which is not None:
            found[name] = getattr(parameter, which)
    return found


def read_infer(asked: Message) -> tuple[InferRequest, list[bytes | None]]:
    """A ``ModelInferRequest`` and its tensors' bytes, ``None`` for those whose contents are typed. DataError."""
    raw = list(asked.raw_input_contents)
    inputs = [
        InputTensor(
            tensor.name, list(tensor.shape), tensor.datatype, parameters_of(tensor.parameters),
            None if raw and not tensor.HasField("contents") else _texts(tensor),
        )
        for tensor in asked.inputs
    ]  # fmt: skip
    if raw and len(raw) != len(asked.inputs):
        raise DataError(f"raw_input_contents has {len(raw)} entries for {len(asked.inputs)} inputs; expected as many")
    outputs = [AskedOutput(output.name, parameters_of(output.parameters)) for output in asked.outputs]
    request = InferRequest(inputs, asked.id or None, parameters_of(asked.parameters), outputs or None)
    return request, list(raw) if raw else [None] * len(inputs)


def write_infer(call: InferCall, predictions: Sequence[Prediction]) -> Message:
    """A ``ModelInferResponse``; its tensors are raw bytes."""
    response = message("ModelInferResponse")(
        model_name=call.model.name, model_version=version_of(call, predictions) or "", id=call.id or ""
    )
    for name, value in response_parameters(predictions).items():
        response.parameters[name].string_param = value
    for tensor in tensors_of(call, predictions):
        _, blob = tensor.as_binary()
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(blob)
    return response


def config(known: JsonMapping) -> Message:
    """A ``ModelConfigResponse`` of what ``oip_model.config`` gives."""
    tensors = {
        which: [tensor | {"data_type": _DATA_TYPES[tensor["data_type"]]} for tensor in known[which]]
        for which in ("input", "output")
    }
    parameters = {name: message("ModelParameter")(**value) for name, value in known["parameters"].items()}
    return message("ModelConfigResponse")(config={**known, **tensors, "parameters": parameters})


def statistics(entries: Iterable[JsonMapping]) -> Message:
    """A ``ModelStatisticsResponse`` of what ``Statistics.of`` gives."""
    response = message("ModelStatisticsResponse")()
    for entry in entries:
        response.model_stats.add(**{name: value for name, value in entry.items() if name != "batch_stats"})
    return response


def _texts(tensor: Message) -> list[str]:
    try:
        return [element.decode() for element in tensor.contents.bytes_contents]
    except UnicodeDecodeError:
        raise DataError(f"input {tensor.name!r}: an element is not UTF-8; expected texts") from None
