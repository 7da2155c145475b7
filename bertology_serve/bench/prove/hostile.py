"""Figure 12: nothing that lies in the served directory or comes in a body is published, or brings the server down.

Figure 16: neither do connections that end nowhere, nor do they keep anybody else from being answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from bertology_serve.bench.prove.cores import resident_bytes
from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.stage import Served, Stage
from bertology_serve.bench.prove.traffic import Outcomes, closed, percentile, predict
from bertology_serve.bench.serving.wire import Broken, Wire, request_bytes
from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BertologyError
from bertology_serve.serving.versions.delta_registry import Registry

WEIGHTS, MANIFEST = "adapter_model.safetensors", "delta.json"
Damage = Callable[[Path], object]
FLOOR = 200
ATTACKERS, CONNECTIONS = 64, 48  # more than there is room for
GROWTH, LIVENESS = 20 * 2**20, 0.1
_GET, _POST = b"GET /health HTTP/1.1\r\nHost: x\r\n", b"POST /predict HTTP/1.1\r\nHost: x\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
ATTACKS: tuple[tuple[bytes, bytes], ...] = (  # how a connection begins, and what it goes on with
    (b"", b""),
    (b"", b"\r\n"),
    (_GET, b"X: x\r\n" * 50),
    (_GET + b"X: ", b"x" * 16_384),
    (b"\x16\x03\x01", b"\x00" * 500),
    (_GET + b"\r\n", b"\r\n"),
    (_GET + b"\r\n", (_GET + b"\r\n") * 400),
    (_GET + b"Content-Length: 999999999\r\n\r\n", b"x"),
    (_POST + b"Content-Length: 60000\r\n\r\n", b"x"),
    (_POST + _CHUNKED, b"1\r\nx\r\n" * 2000),
    (_GET + _CHUNKED + b"1;", b"x" * 16_384),
    (_GET + _CHUNKED + b"0\r\n", b"a: b\r\n" * 2000),
    (_GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"x"),
)


def measure(stage: Stage) -> Measured:
    """Each damage on a copy of a good delta: it must be refused with an error of this package, and not answer."""
    counts = stage.count(130, 600), stage.count(80, 400)
    published, crashed, tried = [], [], 0
    registry = Registry(Pipeline(stage.encoder), stage.directory / "hostile")
    for number, damage in enumerate(damages(counts[0])):
        target = stage.directory / "hostile" / "mood" / "1"
        shutil.rmtree(target.parent.parent, ignore_errors=True)
        shutil.copytree(stage.zoo / "mood" / "1", target)
        damage(target)
        tried += 1
        try:
            registry.put("mood")
            published.append(number)
            registry.remove("mood")
        except BertologyError:
            pass
        except Exception as problem:  # what is looked for
            crashed.append(f"{number}: {type(problem).__name__}")
    shutil.rmtree(stage.directory / "hostile", ignore_errors=True)
    bodies, faults = _bodies(stage, counts[1])
    words = f"{tried} deltas, {bodies} bodies: {len(published)} published, {len(crashed)} crashes, {len(faults)} of 5xx"
    holds = not published and not crashed and not faults and tried + bodies >= FLOOR
    return Measured(words, holds, {"published": published, "crashed": crashed, "faults": faults})


def damages(count: int) -> Iterator[Damage]:
    """So many ways to spoil a delta: a fixed list, then cuts and flipped bytes at random places."""
    fixed: list[Damage] = [
        lambda path: (path / WEIGHTS).unlink(),
        lambda path: (path / WEIGHTS).write_bytes(b""),
        lambda path: (path / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        lambda path: (path / WEIGHTS).write_bytes(struct.pack("<Q", 100_000_000) + b"{" * 1000),
        lambda path: (path / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        lambda path: _link(path / WEIGHTS, Path("/etc/passwd")),
        lambda path: _link(path / MANIFEST, Path("/dev/zero")),
        lambda path: _folder(path / WEIGHTS),
        lambda path: _folder(path / MANIFEST),
        lambda path: (path / MANIFEST).write_bytes(b"[" * 100_000),
        lambda path: (path / MANIFEST).write_bytes(b'{"format": 1, ' + b'"a": {' * 5000),
        lambda path: (path / MANIFEST).write_bytes(b" " * (8 << 20)),
        lambda path: (path / MANIFEST).write_bytes("\ufeff{}".encode("utf-16")),
        lambda path: os.truncate(path / WEIGHTS, 40 << 30),
    ]
    fields: list[tuple[str, object]] = [
        ("format", 2), ("format", "1"), ("name", "../../etc"), ("name", "x" * 300), ("name", None), ("base", {}),
        ("task", {"kind": "pickle"}), ("task", None), ("kinds", {"evil": {}}), ("kinds", {"lora": {"rank": 10**9}}),
        ("kinds", {"lora": {"rank": -1}}), ("kinds", {"lora": {"alpha": "x"}}), ("tensors", {}), ("head", {}),
        ("tensors", {"lora.query.a": [2**31, 2**31, 4]}), ("files", {}), ("files", {"../x": {}}), ("anatomy", {}),
        ("metrics", {"a": "b"}), ("provenance", 3), ("extra", 1),
    ]  # fmt: skip
    fixed += [partial(_edit, name=name, value=value) for name, value in fields]
    yield from fixed[:count]
    draw = random.Random(0)
    for number in range(count - len(fixed)):
        file, place = (WEIGHTS, MANIFEST)[number % 2], draw.random()
        yield partial(_cut, file=file, place=place) if number % 3 else partial(_flip, file=file, place=place)


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _edit(path: Path, name: str, value: object) -> None:
    content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    content[name] = value
    (path / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


def _cut(path: Path, file: str, place: float) -> None:
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: int(place * (len(content) - 1))])


def _flip(path: Path, file: str, place: float) -> None:
    """One byte becomes another, in the manifest one that is not ASCII."""
    content = bytearray((path / file).read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x80
    (path / file).write_bytes(bytes(content))


def _bodies(stage: Stage, count: int) -> tuple[int, list[str]]:
    """Bodies that no client would send, to every route that reads one; the answers of 5xx."""
    import httpx

    draw, faults, sent = random.Random(1), [], 0
    paths = ("/predict", "/models/mood", "/v2/models/mood/infer", "/v1/embeddings", "/embed", "/rerank", "/tokenize")
    good = json.dumps({"delta": "mood", "model": "mood", "inputs": ["a"], "text": "a"}).encode()
    bomb = gzip.compress(bytes(32 << 20))
    with stage.server(stage.zoo) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        from bertology_serve.bench.prove.stage import HEADERS

        for number in range(count):
            headers = dict(HEADERS)
            body = (
                b"[" * 50_000, b'{"inputs":' + b"[" * 900, bomb, b"\xff" * 1000,
                good[: draw.randrange(len(good))], bytes(draw.randrange(256) for _ in range(200)),
                b'{"delta": "mood", "text": ' + b"9" * 5000 + b"}", good.replace(b'"a"', b"1e999"),
                good.replace(b'"a"', b'"\\ud800"'), b"",
            )[number % 10]  # fmt: skip
            if number % 10 == 2:
                headers["Content-Encoding"] = "gzip"
            if number % 4 == 3:
                headers["Inference-Header-Content-Length"] = str(draw.choice([0, 7, 10**9, "x"]))
            status = client.post(paths[number % len(paths)], content=body, headers=headers).status_code
            sent += 1
            if status >= 500:
                faults.append(f"{paths[number % len(paths)]}: {status}")
        client.get("/health").raise_for_status()
    return sent, faults


def connections(stage: Stage) -> Measured:
    """Callers with keys and probes of liveness, first by themselves, then beside attackers who have no keys.

    The server has room for fewer connections than there are attackers, and little patience.
    """
    seconds = stage.seconds(10.0, 600.0)
    options = ("--max-connections", str(CONNECTIONS), "--max-body-seconds", "2")
    with stage.server(stage.zoo, *options) as served:
        asyncio.run(_beside(served, seconds / 10, 0))
        before = resident_bytes(served.pid)
        calls, alive, most = asyncio.run(_beside(served, seconds, ATTACKERS))
    grown, slowest = most - before, percentile(alive.answered, 0.99)
    harmed = len(calls.refused) + calls.broken + len(alive.refused) + alive.broken
    words = (
        f"{ATTACKERS} attackers for {seconds:.0f} s: {grown / 2**20:+.1f} MB, liveness p99 {1e3 * slowest:.0f} ms, "
        f"{len(calls.answered)} calls with keys and {len(alive.answered)} probes answered, {harmed} not"
    )
    facts = {"grown_bytes": grown, "liveness_p99_s": slowest, "harmed": harmed,
             "calls_p99_s": percentile(calls.answered, 0.99)}  # fmt: skip
    return Measured(words, grown <= GROWTH and slowest <= LIVENESS and not harmed, facts)


async def _beside(served: Served, seconds: float, attackers: int) -> tuple[Outcomes, Outcomes, int]:
    """What became of calls and of probes meanwhile, and the most memory that the server took."""
    end, alive, sizes = time.perf_counter() + seconds, Outcomes(), [0]
    hostile = [asyncio.create_task(_attack(served.url, number, end)) for number in range(attackers)]

    async def probe() -> None:
        """As an orchestrator asks: over a connection of its own each time, without a key."""
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                async with Wire(served.url) as wire:
                    reply = await wire.send(request_bytes("GET", "/v2/health/live"))
                alive.note(reply.status, time.perf_counter() - started, True)
            except (OSError, Broken):
                alive.broken += 1
            sizes.append(resident_bytes(served.pid))
            await asyncio.sleep(0.05)

    ask = predict("mood", "the river bank was very cold")
    calls, _ = await asyncio.gather(closed(served.url, lambda: ask, 2, seconds), probe())
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    return calls, alive, max(sizes)


async def _attack(url: str, number: int, end: float) -> None:
    """Connects, goes on for a while without reading, and begins again, hung up on or not."""
    draw, parts = random.Random(number), urlsplit(url)
    while time.perf_counter() < end:
        start, piece = draw.choice(ATTACKS)
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1)
            try:
                writer.write(start)
                for _ in range(draw.randrange(200)):
                    if piece and writer.transport.get_write_buffer_size() < len(piece):
                        writer.write(piece)
                    await asyncio.sleep(0.1 * draw.random())
                    if writer.is_closing():
                        break
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.05)
