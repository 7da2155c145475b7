from __future__ import annotations

import signal
import socket

import pytest

from bertology_serve.errors import InputError
from bertology_serve.serving.server import bind, url_of
from tests.serving.running import running


def test_a_taken_port_is_said_at_once():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is taken; stop what listens there or choose"):
            bind("127.0.0.1", port)


def test_an_address_that_is_not_here():
    with pytest.raises(InputError, match=r"cannot listen on 192.0.2.1:0: .*; choose another --host"):
        bind("192.0.2.1", 0)


def test_url_of_a_socket():
    with bind("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_url_of_a_socket_of_version_6():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        bound = bind("::1", 0)
    except InputError:
        pytest.skip("no IPv6 loopback here")
    with bound:
        assert url_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"


def test_signals_drain_then_stop_then_give_up(pipeline):
    with running(pipeline, drain_seconds=60.0) as started:
        server = started.server
        server.handle_exit(signal.SIGTERM, None)
        assert (server.engine.ready, server.should_exit) == (False, False)
        server.handle_exit(signal.SIGTERM, None)
        assert (server.should_exit, server.force_exit) == (True, False)
        server.handle_exit(signal.SIGINT, None)
        assert server.force_exit
