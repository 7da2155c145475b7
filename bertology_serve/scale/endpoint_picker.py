"""The router as Envoy's endpoint picker: Envoy carries the calls, and asks over gRPC which replica each should go to.

This is Envoy's external processing (``envoy.service.ext_proc.v3``), as the endpoint picker protocol of Kubernetes'
Gateway API Inference Extension uses it. The answer is a header and metadata of one name,
``x-gateway-destination-endpoint``: "IP:PORT,IP:PORT", of which Envoy takes the second where the first does not answer.
A stream is one call: its head and body come, the choice goes back, the head of the answer comes, and it is no load.

Envoy may send bodies whole (BUFFERED) or as they come, wanting them back (FULL_DUPLEX_STREAMED). Of the latter no more
is kept than what a name is looked for in.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import unquote

import grpc

from bertology_serve.errors import BertologyError, LimitError, Overloaded, RateLimited
from bertology_serve.scale.calls import PEEKED, delta_of, tokens_of
from bertology_serve.scale.placement import Placement, ReplicaState
from bertology_serve.scale.router_metrics import RouterMetrics
from bertology_serve.serving.http.errors import problem_response
from bertology_serve.serving.protocol.grpc_messages import Message, messages

PACKAGE = "envoy.service.ext_proc.v3"
DESTINATION, SUBSET = "x-gateway-destination-endpoint", "x-gateway-destination-endpoint-subset"
OVERWRITE, FULL_DUPLEX = 2, 4  # HeaderAppendAction and BodySendMode of Envoy
SERVING, NOT_SERVING = 1, 2
# What is used of Envoy's messages, by their numbers; names, and the package of some, do not go over the wire
TABLE = """
HeaderValue: string key, string value, bytes raw_value
HeaderMap: HeaderValue* headers
HttpHeaders: HeaderMap headers, bool end_of_stream=3
HttpBody: bytes body, bool end_of_stream
HttpTrailers: HeaderMap trailers
ListValue: Value* values
Value: string string_value=3, Struct struct_value=5, ListValue list_value=6
Struct: Value{} fields
Metadata: Struct{} filter_metadata
ProtocolConfiguration: int32 request_body_mode, int32 response_body_mode
ProcessingRequest: HttpHeaders request_headers=2, HttpHeaders response_headers=3, HttpBody request_body=4, \
HttpBody response_body=5, HttpTrailers request_trailers=6, HttpTrailers response_trailers=7, \
Metadata metadata_context=8, ProtocolConfiguration protocol_config=11
HeaderValueOption: HeaderValue header, int32 append_action=3
HeaderMutation: HeaderValueOption* set_headers
StreamedBodyResponse: bytes body, bool end_of_stream
BodyMutation: StreamedBodyResponse streamed_response=3
CommonResponse: HeaderMutation header_mutation=2, BodyMutation body_mutation=3
HeadersResponse: CommonResponse response
BodyResponse: CommonResponse response
TrailersResponse: HeaderMutation header_mutation
HttpStatus: int32 code
ImmediateResponse: HttpStatus status, HeaderMutation headers, bytes body
ProcessingResponse: HeadersResponse request_headers, HeadersResponse response_headers, BodyResponse request_body, \
BodyResponse response_body, TrailersResponse request_trailers, TrailersResponse response_trailers, \
ImmediateResponse immediate_response, Struct dynamic_metadata
HealthCheckRequest: string service
HealthCheckResponse: int32 status
"""
_message = messages(PACKAGE, TABLE)
Asked, Answer = _message("ProcessingRequest"), _message("ProcessingResponse")


@dataclass
class PickedCall:
    """A call whose parts come: what is known of it, and the replica that it was sent to."""

    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    streamed: tuple[str, ...] = ()  # bodies that come as they come, and go back
    outside: tuple[str, ...] = ()  # replicas that it may not go to
    replica: ReplicaState | None = None
    tokens: float = 0.0


class EndpointPicker:
    """Answers Envoy from the router's own ``placement`` and ``metrics``; ``ready`` says whether it should be asked."""

    def __init__(
        self, placement: Placement, metrics: RouterMetrics, max_body_bytes: int, ready: Callable[[], bool]
    ) -> None:
        self._placement, self._metrics, self._max_body_bytes, self._ready = placement, metrics, max_body_bytes, ready

    def handlers(self) -> tuple[object, ...]:
        """The methods for a gRPC server: Envoy's, and gRPC's own for health."""
        health = _message("HealthCheckRequest").FromString, _message("HealthCheckResponse").SerializeToString
        methods = {
            f"{PACKAGE}.ExternalProcessor": {
                "Process": grpc.stream_stream_rpc_method_handler(self.process, Asked.FromString)
            },
            "grpc.health.v1.Health": {"Check": grpc.unary_unary_rpc_method_handler(self.check, *health)},
        }
        return tuple(grpc.method_handlers_generic_handler(name, found) for name, found in methods.items())

    async def check(self, asked: Message, _: object) -> Message:
        """Whether it is alive (of the service ``liveness``), whether it can choose (of any other)."""
        well = asked.service == "liveness" or self._ready()
        return _message("HealthCheckResponse")(status=SERVING if well else NOT_SERVING)

    async def process(self, asked: AsyncIterator[Message], _: object) -> AsyncIterator[bytes]:
        """One call, from its head to that of its answer, or until Envoy ends the stream."""
        call = PickedCall()
        try:
            async for part in asked:
                for answer in self._answers(call, part):
                    yield answer
        except BertologyError as problem:
            yield self._refused(call, problem)
        finally:
            self._end(call)

    def _answers(self, call: PickedCall, part: Message) -> Iterator[bytes]:
        """What Envoy is told after a part of a call. LimitError, Overloaded, RateLimited."""
        [(descriptor, content), *_] = part.ListFields()
        kind, streamed = descriptor.name, "request_body" in call.streamed
        if kind == "request_headers":
            self._read_head(call, part)
            if content.end_of_stream:
                yield self._choice(call, kind)
            elif "request_body" not in call.streamed:
                yield _went_on(kind)
        elif kind == "request_body" and not streamed and call.replica is None:
            call.body = content.body
            yield self._choice(call, kind)
        elif kind.startswith("request") and streamed and call.replica is None:
            trailers = kind == "request_trailers"
            call.body += b"" if trailers else content.body
            if trailers or content.end_of_stream or len(call.body) > PEEKED:
                yield self._choice(call, "request_headers")
                yield _streamed("request_body", call.body, not trailers and content.end_of_stream)
                if trailers:
                    yield _went_on(kind)
        else:
            if kind == "response_headers" and call.replica is not None:
                self._metrics.call(call.replica.name, int(_heads(content).get(":status", 0)))
                self._end(call)
            yield _streamed(kind, content.body, content.end_of_stream) if kind in call.streamed else _went_on(kind)

    def _read_head(self, call: PickedCall, part: Message) -> None:
        call.headers = _heads(part.request_headers)
        call.path = unquote(call.headers.get(":path", "").partition("?")[0])
        modes = part.protocol_config
        bodies = ("request_body", modes.request_body_mode), ("response_body", modes.response_body_mode)
        call.streamed = tuple(name for name, mode in bodies if mode == FULL_DUPLEX)
        hint = part.metadata_context.filter_metadata
        if "envoy.lb.subset_hint" in hint and SUBSET in hint["envoy.lb.subset_hint"].fields:
            value = hint["envoy.lb.subset_hint"].fields[SUBSET]
            names = ",".join([value.string_value, *(one.string_value for one in value.list_value.values)])
            allowed = {one.strip() for one in names.split(",")}
            replicas = self._placement.replicas.values()
            call.outside = tuple(one.name for one in replicas if one.endpoint not in allowed)

    def _choice(self, call: PickedCall, kind: str) -> bytes:
        """The replica for a call, and another one for where that does not answer."""
        size = max(len(call.body), _number(call.headers, "content-length"))
        if size > self._max_body_bytes:
            raise LimitError(f"the body is larger than {self._max_body_bytes} bytes; send less in one call")
        delta, tokens = delta_of(call.path, call.body), tokens_of(size)
        self._placement.count(delta, tokens, time.monotonic())
        replica = self._placement.begin(delta, tokens, call.outside)
        if replica is None:
            raise Overloaded("no replica takes calls for this now; try again in 1 s", 1.0)
        call.replica, call.tokens = replica, tokens
        allowed = _number(call.headers, "x-request-timeout-ms") / 1000
        if allowed and replica.capacity and (replica.load - tokens) / replica.capacity > allowed:
            raise RateLimited("what waits takes longer than the time of this call; send less, or allow more", 1.0)
        self._metrics.met(replica, delta)
        other = self._placement.begin(delta, 0.0, (*call.outside, replica.name))
        return _chosen(kind, f"{replica.endpoint},{other.endpoint}" if other else replica.endpoint)

    def _refused(self, call: PickedCall, problem: BertologyError) -> bytes:
        """The answer to a caller whose call goes to no replica."""
        reply = problem_response(problem, call.path)
        self._metrics.call("", reply.status_code)
        headers = [_header(name, value) for name, value in reply.headers.items() if name != "content-length"]
        return Answer(
            immediate_response={
                "status": {"code": reply.status_code}, "headers": {"set_headers": headers}, "body": bytes(reply.body)
            }
        ).SerializeToString()  # fmt: skip

    def _end(self, call: PickedCall) -> None:
        """It is no load any more."""
        if call.replica is not None:
            self._placement.end(call.replica, call.tokens)
            call.tokens = 0.0


def _heads(content: Message) -> dict[str, str]:
    """The headers that count here; Envoy sends their values as bytes."""
    return {one.key: one.value or one.raw_value.decode("latin-1") for one in content.headers.headers}


def _number(headers: dict[str, str], name: str) -> int:
    """A header that is a whole number, 0 where it is none."""
    value = headers.get(name, "")
    return int(value) if value.isdecimal() and len(value) <= 10 else 0


def _header(name: str, value: str) -> dict[str, object]:
    return {"header": {"key": name, "raw_value": value.encode("latin-1")}, "append_action": OVERWRITE}


@lru_cache(maxsize=4096)
def _chosen(kind: str, destination: str) -> bytes:
    """Where the call goes, said twice: gateways read the header or the metadata."""
    answer = Answer(**{kind: {"response": {"header_mutation": {"set_headers": [_header(DESTINATION, destination)]}}}})
    answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION].string_value = destination
    return answer.SerializeToString()


@lru_cache(maxsize=8)
def _went_on(kind: str) -> bytes:
    return Answer(**{kind: {}}).SerializeToString()


def _streamed(kind: str, body: bytes, ended: bool) -> bytes:
    """A part of a body, given back as it came."""
    part = {"streamed_response": {"body": body, "end_of_stream": ended}}
    return Answer(**{kind: {"response": {"body_mutation": part}}}).SerializeToString()
