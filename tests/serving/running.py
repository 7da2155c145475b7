"""A server that runs while a test does: a real socket, a thread of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.serving.config import ServerConfig
from bertology_serve.serving.http.listening import bind, url_of
from bertology_serve.serving.keys import Keyring
from bertology_serve.serving.server import Server
from bertology_serve.serving.versions.delta_registry import Registry
from tests.scale.routed import routing, through_envoy

ROUTED = "BERTOLOGY_TESTS_ROUTED"


class Running:
    """A started server, its address, and a client for it."""

    def __init__(self, server: Server, url: str, client: httpx.Client) -> None:
        self.server, self.url, self.client = server, url, client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Posts JSON, or bytes as they are, without a Content-Type."""
        if isinstance(body, bytes):
            return self.client.post(path, content=body, **options)
        return self.client.post(path, json=body, **options)


@contextmanager
def running(
    pipeline: Pipeline,
    keyring: Keyring | None = None,
    root: Path | None = None,
    registry: Registry | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A server on a free port, stopped and joined at the end; its clocks run out on no slow machine."""
    config = ServerConfig.of(
        **{"port": 0, "max_call_seconds": 120.0, "drain_seconds": 0.0, "shutdown_seconds": 20.0, **options}
    )
    bound = bind(config.listen.host, config.listen.port)
    server = Server(registry or Registry(pipeline, root), config, keyring=keyring)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait(lambda: server.started or not thread.is_alive())
        with ExitStack() as stack:
            url = url_of(bound)
            if ROUTED in os.environ:  # the same tests through a router
                enveloped = os.environ[ROUTED] == "envoy"
                options = {"max_body_bytes": config.limits.max_body_bytes, "ext_proc_port": 0 if enveloped else None}
                routed = stack.enter_context(routing([url], **options))
                wait(lambda: routed.ready)
                url = str(stack.enter_context(through_envoy(routed)).base_url) if enveloped else routed.url
            client = stack.enter_context(httpx.Client(base_url=url, timeout=120))
            yield Running(server, str(client.base_url), client)
    finally:
        server.should_exit = True
        thread.join(120)
    assert not thread.is_alive(), "the server did not stop"


def wait(condition: Any, seconds: float = 120.0) -> None:
    """Until it is so; the clock is there for what never comes, and decides nothing on a slow machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
