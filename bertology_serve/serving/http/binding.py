"""The socket that the server listens on, and how many connections the process has room for."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path

from bertology_serve.errors import InputError

log = logging.getLogger(__name__)
KEPT = 48  # descriptors for all else: files that are read, executors that are started again
LEAST = 8  # connections, however few descriptors there are


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening; InputError where it cannot be had.

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
            f"port {port} of {host} is taken; stop what listens there or choose another --port"
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
