from __future__ import annotations

import os
import resource
import signal
import socket

import httpx
import pytest

from bertology_serve.errors import InputError
from bertology_serve.serving.http.listening import KEPT, LEAST, _taken, bind, room_for, url_of
from tests.serving.running import running, wait


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


@pytest.mark.parametrize(
    ("limits", "room", "raised"),
    [
        ((10_000, 10_000), 100, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 100, None),
        ((90, 10_000), 100, "enough"),
        ((90, resource.RLIM_INFINITY), 100, "enough"),
        ((90, 120), "less", 120),
        ((10, 10), LEAST, None),
    ],
)
def test_there_are_fewer_connections_than_descriptors(limits, room, raised, monkeypatch, caplog):
    """So that connections take none from files, and from executors that are started again."""
    monkeypatch.setattr(os, "listdir", lambda _: ["0"] * 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    told = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: told.append(pair))
    found = room_for(100)
    assert found == (120 - 20 - KEPT if room == "less" else room)
    most = 20 + KEPT + 100 if raised == "enough" else raised
    assert told == ([] if raised is None else [(most, limits[1])])
    assert ("room for" in caplog.text) == (found < 100)


def test_half_dead_connections_shut_nobody_out(pipeline):
    with running(pipeline, max_connections=16) as started:
        url, lines = httpx.URL(started.url), list[socket.socket]()
        assert started.client.get("/health").status_code == 200
        for number in range(100):
            lines.append(socket.create_connection((url.host, url.port), timeout=120))
            lines[-1].sendall((b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"GET")[number % 2])
        with httpx.Client(base_url=started.url, timeout=120) as other:
            for _ in range(3):
                assert other.get("/health").status_code == 200
                assert other.post("/predict", json={"delta": "mood", "text": "cat"}).status_code == 200
        wait(lambda: len(started.server.config.http_protocol_class.crowd) <= 16)
        for line in lines:
            line.close()


def test_signals_drain_then_stop_then_give_up(pipeline):
    with running(pipeline, drain_seconds=60.0) as started:
        server = started.server
        server.handle_exit(signal.SIGTERM, None)
        assert (server.service.ready, server.should_exit) == (False, False)
        server.handle_exit(signal.SIGTERM, None)
        assert (server.should_exit, server.force_exit) == (True, False)
        server.handle_exit(signal.SIGINT, None)
        assert server.force_exit


def test_a_terminal_that_hangs_up_drains_too(pipeline):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with running(pipeline, drain_seconds=60.0) as started:
            with started.server.capture_signals():
                signal.raise_signal(signal.SIGHUP)
            assert (started.server.service.ready, started.server.should_exit) == (False, False)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_server_under_nohup_goes_on(pipeline):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(pipeline) as started:
            with started.server.capture_signals():
                signal.raise_signal(signal.SIGHUP)
            assert started.server.service.ready
    finally:
        signal.signal(signal.SIGHUP, before)


def test_connections_rest_longer_than_load_balancers_let_them(pipeline):
    with running(pipeline) as started:
        assert started.server.config.http_protocol_class.keep_alive > 60


def test_connections_that_wait_to_be_accepted_are_taken_before_the_socket_closes():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        waiting = [socket.create_connection(listening.getsockname()) for _ in range(3)]
        taken = list(_taken(listening))
        assert {one.getpeername() for one in taken} == {one.getsockname() for one in waiting}
        assert list(_taken(listening)) == []
        for one in (*waiting, *taken):
            one.close()


def test_calls_of_connections_that_came_just_before_the_end_are_answered(pipeline, monkeypatch):
    monkeypatch.setattr("bertology_serve.serving.http.listening.READ_SECONDS", 1.0)
    with running(pipeline) as server:
        url = httpx.URL(server.url)
        body = b'{"delta": "mood", "text": "late"}'
        call = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection((url.host, url.port), timeout=120) as late:
            server.server.should_exit = True
            wait(lambda: not server.server.servers[0].is_serving())
            late.sendall(call)
            assert late.recv(1000).startswith(b"HTTP/1.1 200 ")
