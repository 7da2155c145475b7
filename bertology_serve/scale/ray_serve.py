"""The deltas behind Ray Serve: engines, each with our own batcher, and calls sent to where their delta lives.

Ray's proxy hands every call to an ingress, which reads what delta it asks; ``PlacementRouter`` chooses the engine. Each
engine is a whole server but for its port, so all routes, keys and limits are the server's own. ``@serve.batch`` is not
used, nor is ``@serve.multiplexed``: the one splits batches by delta, the other pins a delta that is asked much to one
engine. What changes deltas goes to all engines, and into the state file, which engines that come later obey first.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, cast

import msgspec
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from bertology_serve.errors import BertologyError, Crashed, LimitError, SpecError
from bertology_serve.files import JsonMapping, JsonObject, replacing
from bertology_serve.scale.calls import CHANGE, SERVED_BY, STATE, delta_of, tokens_of
from bertology_serve.scale.placement import Placement, ReplicaState
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.connection import WHOLE
from bertology_serve.serving.http.errors import problem_response
from bertology_serve.serving.http.request_id import REQUEST_ID_FIELD
from bertology_serve.serving.observability.logs import place_of
from bertology_serve.serving.serve import serve as serve_here
from bertology_serve.serving.server import Application, Server
from bertology_serve.serving.service import READY
from bertology_serve.serving.versions.desired import Desired, Wish, parse_desired, read_desired, write_desired
from bertology_serve.tasks.answers import Version

log = logging.getLogger(__name__)
ENGINES = "engines"
MOST_CALLS = 10_000  # that one engine may have: its own limits are below that, and say more
STATS_SECONDS = 1.0  # between two looks at what an engine holds
WAIT_SECONDS = 0.1  # that work should wait in an engine's queue on average, where engines come and go by themselves


class RayCall(NamedTuple):
    """A call on its way to an engine: its head, its body, and what is chosen by."""

    head: Scope  # of ASGI, as far as an application reads it
    body: bytes
    delta: str | None
    tokens: float
    tried: tuple[str, ...] = ()


class RayAnswer(NamedTuple):
    """What an engine answered, and which one it was."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    engine: str


class RayEngine:
    """One replica: a server that is asked by ``ask`` and not over a port. Arguments are those of ``serving.serve``."""

    async def __init__(  # type: ignore[misc]
        self, backbone: str, deltas: str, config: ServerConfig, options: JsonMapping
    ) -> None:
        opened, self._ended = Future[Server](), threading.Event()

        def run(server: Server) -> None:
            opened.set_result(server)
            self._ended.wait()

        def failed(thread: asyncio.Task[None]) -> None:
            if not opened.done() and (problem := thread.exception()) is not None:
                opened.set_exception(problem)

        self._thread = asyncio.create_task(asyncio.to_thread(serve_here, backbone, deltas, config, run=run, **options))
        self._thread.add_done_callback(failed)
        server = await asyncio.wrap_future(opened)
        self._service, self._app = server.service, cast(Application, server.config.app)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def __del__(self) -> None:
        await self._lifespan.__aexit__(None, None, None)
        self._ended.set()
        await self._thread

    async def ask(self, call: RayCall) -> RayAnswer:
        """Answers one call, of whatever route."""
        messages: list[Message] = [{"type": "http.request", "body": call.body}]
        said: list[Message] = []

        async def receive() -> Message:
            return messages.pop() if messages else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            said.append(message)

        await self._app({"type": "http", WHOLE: True, **call.head}, receive, send)
        headers = [one for one in said[0]["headers"] if one[0] != REQUEST_ID_FIELD]  # Ray gives it too
        body = b"".join(message.get("body", b"") for message in said[1:])
        return RayAnswer(said[0]["status"], [*headers, (SERVED_BY, self._name.encode())], body, self._name)

    def record_routing_stats(self) -> JsonObject:
        return {"resident": self._service.registry.resident(), "capacity": self._service.queue.times.rate}

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"queue_seconds": self._service.queue.tokens / self._service.queue.times.rate}

    def check_health(self) -> None:
        if self._service.state != READY:
            raise RuntimeError(f"the engine is {self._service.state}")


class PlacementRouter(RequestRouter):
    """Chooses engines by ``scale.placement``, for the handles of one ingress: its own calls are what it counts."""

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)
        self.placement = Placement()
        self._under_way: dict[str, tuple[ReplicaState, float]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self.placement.keep(one.replica_id.unique_id for one in replicas)
        for one in replicas:
            state = self.placement.replicas[one.replica_id.unique_id]
            state.resident = set(one.routing_stats.get("resident", ()))
            state.capacity = float(one.routing_stats.get("capacity", 0.0))
        self.placement.cool(self._get_curr_time_s())
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.placement.keep(one.unique_id for one in self.curr_replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The engine of the call's delta, and behind it the others in the delta's order, each a rank of its own."""
        if pending_request is None:
            return [candidate_replicas]
        call, key = pending_request.args[0], pending_request.metadata.internal_request_id
        pending_request.routing_context.should_backoff = True
        if key in self._under_way:  # it was asked before, in vain
            self._over(key)
        elif call.delta is not None and not call.tried:
            self.placement.count(call.delta, call.tokens, self._get_curr_time_s())
        chosen = self.placement.begin(call.delta, call.tokens, call.tried)
        if chosen is None:
            return [candidate_replicas]
        self._under_way[key] = chosen, call.tokens
        ranked = [chosen.name, *(one.name for one in self.placement.in_order(call.delta or "") if one is not chosen)]
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        return [[by_name[name]] for name in ranked if name in by_name]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except asyncio.CancelledError:  # nobody waits for the answer any more, and no engine has the call
            self._over(pending_request.metadata.internal_request_id)
            raise

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._over(internal_request_id)

    def _over(self, key: str) -> None:
        if key in self._under_way:
            self.placement.end(*self._under_way.pop(key))


class RayIngress:
    """The ASGI application that Ray's proxies call: it finds a call's delta, and has an engine answer."""

    def __init__(self, engines: DeploymentHandle[RayEngine], config: ServerConfig) -> None:
        self._engines, self._limits, self._state_file = engines, config.limits, config.deltas.state_file
        self._changing = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(routes=[Mount("", self.answer)])

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body, most = bytearray(), self._limits.max_body_bytes
            async for piece in Request(scope, receive).stream():
                body += piece
                if len(body) > most:
                    raise LimitError(f"the body is larger than {most} bytes; send less in one call")
            found = await self._answered(scope, bytes(body))
        except Exception as problem:
            if not isinstance(problem, BertologyError):
                log.error("%s %s raised %s", scope["method"], scope["path"], place_of(problem))
            await problem_response(problem, scope["path"])(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": found.status, "headers": found.headers})
        await send({"type": "http.response.body", "body": found.body})

    async def _answered(self, scope: Scope, body: bytes) -> RayAnswer:
        names = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
        head = {"root_path": "", **{name: scope.get(name) for name in names}}
        call = RayCall(head, body, delta_of(scope["path"], body), tokens_of(len(body)))
        if scope["method"] == "POST" and (scope["path"] == STATE or CHANGE.fullmatch(scope["path"])):
            return await self._changed(call)
        ended = False
        while True:
            try:
                found: RayAnswer = await self._engines.ask.remote(call)
            except RayActorError:  # once: what ends an engine should not end them all
                if ended:
                    raise Crashed("two engines ended while they had this call; try again in 1 s", 1.0) from None
                ended = True
                continue
            if found.status != 503 or call.tried:
                return found
            call = call._replace(tried=(found.engine,))  # it had no room: once another one, where there is one

    async def _changed(self, call: RayCall) -> RayAnswer:
        """Every engine does it; those that come later are told by the state file. The first that refuses is heard."""
        async with self._changing:
            try:
                found: Sequence[RayAnswer] = await self._engines.broadcast("ask", call).results_async()
            except RayActorError:
                raise Crashed(
                    "an engine ended as all were told this; see what they answer, then try again", 5.0
                ) from None
            refused = next((one for one in found if one.status != 200), None)
            if refused is None and self._state_file is not None:
                before = read_desired(self._state_file) if self._state_file.exists() else Desired()
                with replacing(self._state_file) as path:
                    path.write_bytes(write_desired(_wanted(before, call, found[0])))
            return refused or found[0]


def _wanted(before: Desired, call: RayCall, answer: RayAnswer) -> Desired:
    """What is wanted of all deltas, once an engine has answered a change so."""
    change = CHANGE.fullmatch(call.head["path"])
    if change is None:
        return parse_desired(call.body, "the body")
    name, wish = change[1], before.deltas.get(change[1], Wish())
    if change[2] == "unload":
        wish = Wish(loaded=False)
    else:
        wish = replace(wish, version=msgspec.json.decode(answer.body, type=Version).version, loaded=True)
    return replace(before, deltas={**before.deltas, name: wish})


def scale_by_queue(context: AutoscalingContext) -> tuple[float, JsonObject]:
    """As many engines as let work wait ``WAIT_SECONDS`` in their queues; one less where it hardly waits at all.

    Ray's own bounds and delays apply to what this returns.
    """
    waits = list((context.aggregated_metrics or {}).get("queue_seconds", {}).values())
    now, mean = context.target_num_replicas, sum(waits) / len(waits) if waits else WAIT_SECONDS
    if mean > WAIT_SECONDS:
        return math.ceil(now * min(mean / WAIT_SECONDS, 2.0)), {}
    return (now - 1 if mean < WAIT_SECONDS / 4 else now), {}


def application(
    backbone: str, deltas: str, config: ServerConfig, replicas: str = "1", cpus: float = 0, **options: Any
) -> serve.Application:
    """What ``serve.run`` takes: so many engines, ``2``, or as work asks for, ``2-8``; each with ``cpus`` cores and
    threads (0: its share of this machine's), and a GPU where ``device`` is cuda. ``options``: see ``serving.serve``.

    Raises SpecError for numbers that are none, and for gRPC, which is not passed on.
    """
    least, _, most = str(replicas).partition("-")
    if not (least.isdigit() and (most or least).isdigit() and 1 <= int(least) <= int(most or least)):
        raise SpecError(f"replicas is {replicas!r}; expected a number from 1, or two such as 2-8")
    if config.listen.grpc_port is not None:
        raise SpecError("grpc_port: gRPC does not go through Ray; leave it out")
    number: JsonObject = {"num_replicas": int(least)}
    if most:
        policy = AutoscalingPolicy(policy_function=f"{__name__}:scale_by_queue")
        bounds = AutoscalingConfig(min_replicas=int(least), max_replicas=int(most), policy=policy)
        number = {"autoscaling_config": bounds}
    cores = cpus or max(1, (os.cpu_count() or 1) // int(most or least))
    gpus = int(str(options.get("device", "")).startswith("cuda"))
    router = RequestRouterConfig(
        request_router_class=f"{__name__}.PlacementRouter", request_routing_stats_period_s=STATS_SECONDS
    )
    common = serve.deployment(max_ongoing_requests=MOST_CALLS, logging_config={"enable_access_log": False})
    engines = common(RayEngine).options(
        name=ENGINES,
        ray_actor_options={"num_cpus": cores, "num_gpus": gpus},
        graceful_shutdown_timeout_s=config.stopping.shutdown_seconds,
        request_router_config=router,
        **number,
    )
    ingress = common(serve.ingress()(RayIngress)).options(name="ingress", ray_actor_options={"num_cpus": 0})
    return ingress.bind(engines.bind(backbone, deltas, config, options), config)


def app(arguments: JsonMapping) -> serve.Application:
    """For ``serve run bertology_serve.scale.ray_serve:app backbone=minilm deltas=/data replicas=2 max_items=64``: the
    arguments of ``application`` and the server's options, by name. Raises SpecError.
    """
    own = {"backbone", "deltas", "replicas"}
    given = {name: value if name in own else _plain(value) for name, value in arguments.items()}
    if not {"backbone", "deltas"} <= given.keys():
        raise SpecError("expected backbone=NAME and deltas=DIRECTORY")
    others = own | {"cpus"} | inspect.signature(serve_here).parameters.keys()
    config = ServerConfig.of(**{name: value for name, value in given.items() if name not in others})
    return application(config=config, **{name: value for name, value in given.items() if name in others})


def _plain(value: Any) -> Any:
    """What a word of the command line says: a number or true, where it reads so."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def serve_on_ray(application: serve.Application, config: ServerConfig, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT: on the cluster of ``RAY_ADDRESS``, else on one of its own in this machine."""

    def end(*_: object) -> None:
        raise SystemExit(0)

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # Ray's own would end it with a dump
        signal.signal(number, end)
    try:
        serve.start(http_options=HTTPOptions(host=config.listen.host, port=config.listen.port))
        serve.run(application)
        say(f"ready: http://{config.listen.host}:{config.listen.port}")
        threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()
