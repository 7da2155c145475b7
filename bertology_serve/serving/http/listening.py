"""A bound socket, uvicorn around an application, and the way it stops.

SIGTERM, SIGINT or SIGHUP: readiness answers 503 at once, calls are still taken for ``drain_seconds`` (so that load
balancers can notice), then the socket closes and what was accepted is answered. A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from bertology_serve.errors import InputError
from bertology_serve.serving.config import StoppingConfig
from bertology_serve.serving.http.connection import Connection

log = logging.getLogger(__name__)
KEPT = 48  # descriptors for all else: files that are read, executors that are started again
BACKLOG, AT_ONCE = 2048, 16  # connections that may wait to be accepted; that asyncio accepts before it tells of any
READ_SECONDS = 0.1  # for the calls of connections that had just been taken, before those that rest are closed
LEAST = 8  # connections, however few descriptors there are


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket at that address, not yet listening; InputError, which names the ``option``, where it cannot be had.

    Made before anything is loaded, so that a port that is taken is known at once.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as problem:
        taken = problem.errno == errno.EADDRINUSE
        raise InputError(
            f"port {port} of {host} is taken; stop what listens there or choose another {option}"
            if taken
            else f"cannot listen on {host}:{port}: {problem.strerror or problem}; choose another --host"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, for people."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def room_for(connections: int) -> int:
    """How many of so many connections the system allows beside what is open now; the soft limit is raised for them."""
    try:
        import resource

        open_now = len(os.listdir("/proc/self/fd") if Path("/proc/self/fd").is_dir() else os.listdir("/dev/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = open_now + KEPT + connections
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    except (ImportError, OSError, ValueError):  # no such limits here, or none that may be seen
        return connections
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    room = max(soft - open_now - KEPT, LEAST)
    log.warning("room for %d connections, not %d: the system allows %d open files (ulimit -n)", room, connections, soft)
    return room


class DrainingServer(uvicorn.Server):
    """An application behind HTTP, in connections of the kind ``protocol``.

    ``announce`` is called once it answers, ``unready`` as soon as it should answer that it is not ready any more.
    """

    def __init__(
        self,
        app: ASGIApp,
        protocol: type[Connection],
        stopping: StoppingConfig,
        unready: Callable[[], None],
        announce: Callable[[], None],
    ) -> None:
        self._protocol, self._unready, self._announce = protocol, unready, announce
        self._drain_seconds, self._draining = stopping.drain_seconds, False
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here asks where a call came from
                lifespan="on",
                backlog=AT_ONCE,
                timeout_graceful_shutdown=max(1, round(stopping.shutdown_seconds)),
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, and SIGHUP (the terminal has gone) like SIGTERM, unless it is ignored (nohup)."""
        with super().capture_signals():
            mine = threading.current_thread() is threading.main_thread()
            if not mine or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before or signal.SIG_DFL)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain; second: close the socket now; third: do not even answer what was accepted."""
        if self._draining:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        log.info("%s: not ready any more, stopping in %g s", signal.Signals(sig).name, self._drain_seconds)
        self.drain()

    def drain(self) -> None:
        """Readiness turns false now, the socket closes after the configured time. For signal handlers and threads."""
        self._draining = True
        self._unready()
        self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_seconds, self._exit)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)
        crowd = self._protocol.crowd
        crowd.most = room_for(crowd.most)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections. Those that the system has taken already are read first, and answered."""
        waiting = [connection for listening in sockets or [] for connection in _taken(listening)]
        for server in self.servers:
            server.close()
        for connection in waiting:
            await self._loop.connect_accepted_socket(self._connection, connection)
        await asyncio.sleep(READ_SECONDS)
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        """The protocol of one connection, as uvicorn makes it."""
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self._loop
        )
        return made

    def _exit(self) -> None:
        self.should_exit = True


def _taken(listening: socket.socket) -> Iterator[socket.socket]:
    """The connections of a listening socket that nobody has accepted yet; closing it would reset them."""
    listening.setblocking(False)
    with suppress(OSError):
        listening.listen(0)  # so that hardly anybody comes between the last of them and the end
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:  # none is left
            return
        connection.setblocking(False)
        yield connection
