"""The socket that the server listens on."""

from __future__ import annotations

import errno
import socket

from bertology_serve.errors import InputError


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
