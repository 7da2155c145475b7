"""The replicas behind a router: whether each takes calls, what it holds, and that it has the deltas that are wanted.

A replica that joins, or comes back, gets the desired state before it gets calls. A change goes to one replica first,
with the caller's own key; the others follow. Meanwhile calls for that delta go to the first alone, so that they are
sent to one version at any moment. A replica that cannot follow gets no calls for that delta until it can.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from bertology_serve.errors import BertologyError, Overloaded, SpecError
from bertology_serve.files import replacing
from bertology_serve.scale.calls import STATE
from bertology_serve.scale.config import KEY, ReplicaConfig
from bertology_serve.scale.placement import Placement, ReplicaState
from bertology_serve.serving.observability.background import OnceLogger
from bertology_serve.serving.observability.logs import place_of
from bertology_serve.serving.versions.desired import Desired, Wish, parse_desired, read_desired, write_desired
from bertology_serve.tasks.answers import Reconciled, Version

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0  # that a replica may take to say whether it is ready
CHANGE_SECONDS = 120.0  # that it may take to load what it is told to
SCRAPE_SECONDS, RETRY_SECONDS = 1.0, 5.0  # between two looks at its metrics; two tries of what it could not load
MISSED = 2  # looks in vain after which one that was ready is not any more; one where nobody listens
_RESIDENT = re.compile(rb'^vllm:lora_requests_info\{.*?running_lora_adapters="([^"]*)"', re.MULTILINE)
_COUNTED = {
    name: re.compile(rb"^bertology_batch_%s_sum (\S+)" % name.encode(), re.MULTILINE) for name in ("tokens", "seconds")
}


class Reply(NamedTuple):
    """What a replica answered."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}


class ReplicaWatch:
    """What the router remembers of one replica between two looks."""

    def __init__(self, state: ReplicaState) -> None:
        self.state = state
        state.ready = False
        self.joined = False
        self.missed = 0
        self.scraped = self.retried = 0.0
        self.counted = (0.0, 0.0)  # tokens and seconds of its batches
        self.looking: asyncio.Task[None] | None = None


class Replicas:
    """Those of one router. ``run`` watches them; ``load``, ``unload``, ``rollback`` and ``obey`` change them all.

    ``key`` is an API key of theirs with admin rights, for what nobody asks the router to do: without one, replicas that
    have keys are sent calls, but no desired state.
    """

    def __init__(self, config: ReplicaConfig, placement: Placement, session: aiohttp.ClientSession, key: str) -> None:
        self._config, self.placement, self._session = config, placement, session
        self._own = {"X-API-Key": key} if key else {}
        self._watched: dict[str, ReplicaWatch] = {}
        self._changing = asyncio.Lock()
        self._told = OnceLogger(log)
        self.desired = Desired()
        if config.state_file is not None and config.state_file.exists():
            self.desired = read_desired(config.state_file)

    @property
    def ready(self) -> list[ReplicaState]:
        """Those that take calls."""
        return [one for one in self.placement.replicas.values() if one.ready]

    async def run(self) -> None:
        """Watches them until it is cancelled."""
        try:
            while True:
                for one in self.known():
                    if one.looking is None or one.looking.done():  # one that is slow keeps no other waiting
                        one.looking = asyncio.create_task(self.look_at(one))
                await asyncio.sleep(self._config.poll_seconds)
        finally:
            for one in self._watched.values():
                if one.looking is not None:
                    one.looking.cancel()

    def known(self) -> list[ReplicaWatch]:
        """All that there are now, as the options or the file say."""
        try:
            addresses = self._config.addresses()
        except BertologyError as problem:
            self._told.say("replicas", f"{problem}; those that were there before are used")
            addresses = tuple(self._watched)
        if addresses != tuple(self._watched):
            self.placement.keep(addresses)
            states = self.placement.replicas
            self._watched = {name: self._watched.get(name) or ReplicaWatch(states[name]) for name in addresses}
        self.placement.cool(time.monotonic())
        return list(self._watched.values())

    def lost(self, state: ReplicaState) -> None:
        """Nobody listens there any more, as a call found out."""
        if state.ready:
            log.warning("%s does not answer: it gets no calls until it does", state.name)
        state.ready = False
        if watch := self._watched.get(state.name):
            watch.joined = False

    async def look_at(self, watch: ReplicaWatch) -> None:
        """Finds out whether one takes calls; tells it what is wanted before it does."""
        try:
            await self._look_at(watch)
        except Exception as problem:  # what a replica says is not ours to trust
            self._told.say(watch.state.name, f"{watch.state.name}: {place_of(problem)}")
            self.lost(watch.state)

    async def _look_at(self, watch: ReplicaWatch) -> None:
        state = watch.state
        try:
            reply = await self._ask("GET", state, "/v2/health/ready", LOOK_SECONDS)
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError):
            self.lost(state)
            return
        except (aiohttp.ClientError, TimeoutError):
            watch.missed += 1
            if watch.missed >= MISSED:
                self.lost(state)
            return
        watch.missed = 0
        if reply.status != 200:
            if state.ready:
                log.info("%s is not ready: it gets no calls", state.name)
            state.ready = watch.joined = False
            return
        now = time.monotonic()
        try:
            if not watch.joined:
                state.endpoint = await endpoint_of(state.name)
            if not watch.joined or (state.stale and now - watch.retried >= RETRY_SECONDS):
                watch.retried = now
                async with self._changing:
                    wanted = self.desired.only(state.stale) if watch.joined else self.desired
                    state.stale = await self._tell(state, wanted)
                watch.joined = True
            if now - watch.scraped >= SCRAPE_SECONDS:
                watch.scraped = now
                await self._scrape(watch)
        except (aiohttp.ClientError, TimeoutError) as problem:
            self._told.say(state.name, f"{state.name}: {type(problem).__name__} where it was told what is wanted")
            return
        if not state.ready:
            log.info("%s takes calls", state.name)
            self._told.over(state.name)
        state.ready = watch.joined  # a call may have found out meanwhile that nobody listens

    async def _tell(self, state: ReplicaState, desired: Desired) -> set[str]:
        """The deltas that the replica does not have as they are wanted."""
        if not desired.deltas and desired.others == "keep":
            return set()
        reply = await self._ask("POST", state, STATE, CHANGE_SECONDS, write_desired(desired), self._own)
        if reply.status == 200:
            failed = _failed(reply)
            for name, reason in failed.items():
                self._told.say(f"{state.name} {name}", f"{state.name}: {reason}")
            return set(failed)
        self._told.say(
            f"{state.name} state",
            f"{state.name} takes no desired state (status {reply.status}); "
            f"the router needs a key of its with admin rights in {KEY}",
        )
        return set(state.stale)

    async def _scrape(self, watch: ReplicaWatch) -> None:
        """What it holds, and how many tokens a second its batches have."""
        reply = await self._ask("GET", watch.state, "/metrics", LOOK_SECONDS, headers=self._own)
        if reply.status != 200:
            self._told.say(f"{watch.state.name} metrics", f"{watch.state.name} shows no metrics: {reply.status}")
            return
        if found := _RESIDENT.search(reply.body):
            watch.state.resident = set(filter(None, found[1].decode().split(",")))
        sums = [pattern.search(reply.body) for pattern in _COUNTED.values()]
        if all(sums):
            tokens, seconds = (float(one[1]) for one in sums if one)
            before = watch.counted if watch.counted[1] <= seconds else (0.0, 0.0)  # else it began anew
            if seconds - before[1] >= 0.1:
                rate = (tokens - before[0]) / (seconds - before[1])
                watch.state.capacity = (watch.state.capacity + rate) / 2 if watch.state.capacity else rate
                watch.counted = tokens, seconds

    async def load(self, name: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """A version of a delta answers everywhere, or nothing changes; the first replica says which."""
        return await self._publish(name, "load", body, headers)

    async def rollback(self, name: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """The version that answered before on the first replica answers everywhere."""
        return await self._publish(name, "rollback", body, headers)

    async def unload(self, name: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """The delta is taken away everywhere."""
        gone = Wish(loaded=False)
        reply, _ = await self._led(_path(name, "unload"), {name}, body, headers, lambda _: self._want(name, gone))
        return reply

    async def obey(self, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Everything is as the caller wants it, here and on replicas that come later; ``body`` says how."""
        try:
            desired = parse_desired(body, "the body")
        except SpecError:  # the replica says so, to those who may know
            desired = Desired()

        def wanted(_: Reply) -> Desired:
            self.desired = desired
            self._keep()
            return desired

        reply, others = await self._led(STATE, desired.deltas.keys(), body, headers, wanted)
        if reply.status != 200:
            return reply
        failed = {name: f"not on {one.name}" for one in others for name in one.stale} | _failed(reply)
        return reply._replace(body=msgspec.json.encode(Reconciled(failed)))

    async def _publish(self, name: str, how: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        def wanted(reply: Reply) -> Desired:
            version = msgspec.json.decode(reply.body, type=Version).version
            wish = self.desired.deltas.get(name, Wish())
            return self._want(name, replace(wish, version=version, loaded=True))

        reply, others = await self._led(_path(name, how), {name}, body, headers, wanted)
        late = ", ".join(one.name for one in others if name in one.stale)
        if reply.status != 200 or not late:
            return reply
        reason = f"{late} could not follow: no calls for it go there, it is tried again"
        answer = msgspec.json.decode(reply.body, type=Version)
        return reply._replace(body=msgspec.json.encode(Version(name, answer.version, answer.state, reason)))

    async def _led(
        self,
        path: str,
        names: Collection[str],
        body: bytes,
        headers: Mapping[str, str],
        wanted: Callable[[Reply], Desired],
    ) -> tuple[Reply, list[ReplicaState]]:
        """One replica does it first, out of the way of calls for those deltas; then it alone gets them until the others
        have done so too. Its answer, and the others; where it refuses, nothing has changed.
        """
        async with self._changing:
            # the one that has least to do with the delta: the others go on answering
            first, *others = reversed(self._in_turn(min(names, default="")))
            before = set(first.stale)
            if others:
                first.stale |= set(names)
            reply = Reply(0, b"")
            try:
                reply = await self._ask("POST", first, path, CHANGE_SECONDS, body, headers)
            finally:
                if reply.status != 200:
                    first.stale = before
            if reply.status == 200:
                desired = wanted(reply)
                for one in others:  # from here on it is as it was told to be
                    one.stale |= set(names)
                first.stale = (first.stale - set(names)) | (_failed(reply).keys() if path == STATE else set())
                await self._follow(others, desired, headers)
            return reply, others

    async def _follow(self, others: Iterable[ReplicaState], desired: Desired, headers: Mapping[str, str]) -> None:
        """The other replicas do as the first one did; those that cannot are stale for what they could not do."""

        async def one(state: ReplicaState) -> None:
            try:
                reply = await self._ask("POST", state, STATE, CHANGE_SECONDS, write_desired(desired), headers)
            except (aiohttp.ClientError, TimeoutError):
                self.lost(state)
                return
            if reply.status == 200:
                state.stale = (state.stale - desired.deltas.keys()) | _failed(reply).keys()

        await asyncio.gather(*(one(state) for state in others))

    def _in_turn(self, name: str) -> list[ReplicaState]:
        """The replicas that take calls, the delta's own first. Overloaded where there is none."""
        if not self.ready:
            raise Overloaded("no replica takes calls; try again in 1 s", 1.0)
        return self.placement.in_order(name)

    def _want(self, name: str, wish: Wish) -> Desired:
        """Keeps what is wanted of a delta from now on, and says it."""
        self.desired = replace(self.desired, deltas={**self.desired.deltas, name: wish})
        self._keep()
        return Desired({name: wish})

    def _keep(self) -> None:
        if self._config.state_file is not None:
            with replacing(self._config.state_file) as path:
                path.write_bytes(write_desired(self.desired))

    async def _ask(
        self,
        method: str,
        state: ReplicaState,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        limit = aiohttp.ClientTimeout(total=seconds)
        async with self._session.request(
            method, state.name + path, data=body, headers=headers, timeout=limit, allow_redirects=False
        ) as found:
            return Reply(found.status, await found.read(), found.headers)


async def endpoint_of(name: str) -> str:
    """IP:PORT of an address, of IPv4 where it has both. OSError where its name is not known."""
    url = URL(name)
    found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    ip, port = (str(part) for part in min(found)[4][:2])
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _path(name: str, how: str) -> str:
    return f"/v2/repository/models/{quote(name, safe='')}/{how}"


def _failed(reply: Reply) -> dict[str, str]:
    """What a replica could not do of a desired state."""
    return msgspec.json.decode(reply.body, type=Reconciled).failed
