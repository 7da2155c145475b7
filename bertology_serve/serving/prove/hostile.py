"""Figure 12: nothing that lies in the served directory or comes in a body is published, or brings the server down."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bertology_serve.encoder.pipeline import Pipeline
from bertology_serve.errors import BertologyError
from bertology_serve.serving.prove.figure import Measured
from bertology_serve.serving.prove.stage import Stage
from bertology_serve.serving.registry import Registry

WEIGHTS, MANIFEST = "adapter_model.safetensors", "delta.json"
Damage = Callable[[Path], object]
FLOOR = 200


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
        from bertology_serve.serving.prove.stage import HEADERS

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
