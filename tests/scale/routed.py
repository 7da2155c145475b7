"""A router in front of servers of this process, and servers that do what a test wants of them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from bertology_serve.config_fields import nested
from bertology_serve.scale.config import RouterConfig
from bertology_serve.scale.placement import ordered
from bertology_serve.scale.router import Router
from bertology_serve.serving.http.connection import limited
from bertology_serve.serving.http.listening import DrainingServer, bind, url_of

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Routing:
    """A started router, its address, and a client for it."""

    def __init__(self, router: Router, server: DrainingServer, url: str, client: httpx.Client) -> None:
        self.router, self.server, self.url, self.client = router, server, url, client

    @property
    def ready(self) -> set[str]:
        return {one.name for one in self.router.replicas.ready}


@contextmanager
def routing(replicas: Sequence[str], key: str = "", **options: object) -> Iterator[Routing]:
    """A router on a free port in front of those servers, stopped and joined at the end."""
    options = {"replicas": tuple(replicas), "port": 0, "poll_seconds": 0.02, "drain_seconds": 0.0,
               "max_call_seconds": 120.0, **options}  # fmt: skip
    config = nested(RouterConfig, options, "the router has no option")
    router = Router(config, key)
    protocol = limited(config.limits.max_header_bytes, config.limits.max_body_bytes, config.limits.max_body_seconds)
    bound = bind("127.0.0.1", 0)
    server = DrainingServer(router, protocol, config.stopping, router.drain, lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        with httpx.Client(base_url=url_of(bound), timeout=120) as client:
            yield Routing(router, server, url_of(bound), client)
    finally:
        server.should_exit = True
        thread.join(120)
    assert not thread.is_alive(), "the router did not stop"


ENVOY = shutil.which("envoy", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", ""))))


@contextmanager
def envoy(ports: dict[str, list[int]], body_mode: str = "BUFFERED") -> Iterator[str]:
    """The address of the real Envoy, as deploy/envoy has it, on a free port; ``ports`` are those of its clusters."""
    config = yaml.safe_load((Path(__file__).parents[2] / "deploy/envoy/envoy.yaml").read_text())
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    [listener], clusters = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    listener["address"]["socket_address"]["port_value"] = 0
    for cluster in clusters:
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
            {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
            for port in ports[cluster["name"]]
        ]
    picking = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]["typed_config"]
    picking["message_timeout"] = "120s"  # beyond it calls go to any server
    if body_mode != "BUFFERED":  # as gateways of Kubernetes have it
        for way in ("request", "response"):
            picking["processing_mode"] |= {f"{way}_body_mode": body_mode, f"{way}_trailer_mode": "SEND"}
        picking["failure_mode_allow"] = False
    with tempfile.TemporaryDirectory() as folder:
        file, admin, log = (Path(folder) / name for name in ("envoy.yaml", "admin", "log"))
        file.write_text(yaml.safe_dump(config))
        command = [str(ENVOY), "-c", file, "--admin-address-path", admin, "--use-dynamic-base-id", "--concurrency", "1",
                   "--log-path", log, "--log-level", "warning"]  # fmt: skip
        process = subprocess.Popen(command)
        try:
            while not (admin.exists() and admin.read_text()):
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            with httpx.Client(base_url=f"http://{admin.read_text()}") as asked:
                while asked.get("/ready").status_code != 200:
                    time.sleep(0.01)
                [found] = asked.get("/listeners?format=json").json()["listener_statuses"]
            yield f"http://127.0.0.1:{found['local_address']['socket_address']['port_value']}"
        finally:
            process.kill()
            process.wait(60)


@contextmanager
def through_envoy(routed: Routing, body_mode: str = "BUFFERED") -> Iterator[httpx.Client]:
    """A client of an Envoy that asks that router."""
    assert routed.router.picker
    servers = [int(name.rpartition(":")[2]) for name in routed.router.placement.replicas]
    ports = {"servers": servers, "picker": [routed.router.picker.port], "router": [int(routed.url.rpartition(":")[2])]}
    with envoy(ports, body_mode) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


class Replica:
    """A server that answers that it is ready, and calls as ``answer`` does. ``asked`` are the heads of those calls."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self.asked, self.ready = answer, list[bytes](), True
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
                body = await reader.readexactly(int(fields.get(b"content-length", 0)))
                while fields.get(b"transfer-encoding") == b"chunked":
                    size = int(await reader.readuntil(b"\r\n"), 16)
                    body += (await reader.readexactly(size + 2))[:-2]
                    if not size:
                        break
                if head.startswith((b"GET /v2/health", b"GET /metrics")):
                    writer.write(OK if self.ready else OK.replace(b"200 OK", b"503 No"))
                    continue
                self.asked.append(head + body)
                await self._answer(head, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.transport.abort()


@contextmanager
def replica(answer: Answer) -> Iterator[Replica]:
    """One on a free port."""
    made, loop, ended = Replica(answer), asyncio.new_event_loop(), asyncio.Event()
    bound = bind("127.0.0.1", 0)
    made.url = url_of(bound)

    async def run() -> None:
        server = await asyncio.start_server(made.handle, sock=bound)
        await ended.wait()
        server.close()
        handlers = asyncio.all_tasks() - {asyncio.current_task()}
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(60)
        loop.close()


async def answer_ok(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


async def hang_up(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def refuse(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(OK.replace(b"200 OK", b"503 Full").replace(b"content-type", b"retry-after: 3\r\ncontent-type"))


def first_of(*urls: str) -> str:
    """A delta that lives on the first of those replicas."""
    return next(name for number in range(1000) if ordered(name := f"d{number}", tuple(sorted(urls)))[0] == urls[0])
