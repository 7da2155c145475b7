"""Figure 17: whatever happens to the served directory and the desired-state file, what follows them goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertology_serve.bench.prove.figure import Measured
from bertology_serve.bench.prove.hostile import damages
from bertology_serve.bench.prove.stage import HEADERS, Served, Stage

MANIFEST, WEIGHTS = "delta.json", "adapter_model.safetensors"
NAMES = ("mood", "topic", "grade", "x", "A b", "checkpoint-500", ".hidden.1.tmp")
VERSIONS = ("1", "2", "10", "checkpoint-500", ".9.1.tmp", "V 1")
PROBE, WATCH, EVERY, PATIENCE = "probe", 0.02, 10, 60.0
_DAMAGES = list(damages(60))


def measure(stage: Stage) -> Measured:
    """One directory, vandalised, that two servers follow: one watches it, one obeys a state file that is scribbled on.

    Now and then each must still do as it is told. An error that ends a loop counts as a stop, though it begins again.
    """
    changes, draw = stage.count(100, 1000), random.Random(0)
    here = stage.directory / "fuzzed"
    root, state = here / "deltas", here / "state.json"
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(stage.zoo, root)
    for version in "12":
        stage.save(root, PROBE, version, int(version), like="mood")
    deaf, options = 0, ("--watch-seconds", str(WATCH))
    write_state(state, {})
    with stage.server(root, *options) as watching, stage.server(root, *options, "--state-file", str(state)) as obeying:
        for number in range(changes):
            if number % 3:
                vandalise(draw, root, stage.zoo)
            else:
                scribble(draw, state)
            time.sleep(WATCH)
            if number % EVERY == EVERY - 1:
                version = str(100 + number)
                _clear(root / PROBE / version)
                shutil.copytree(root / PROBE / "1", root / PROBE / version)
                chosen = "12"[number // EVERY % 2]
                write_state(state, {"deltas": {PROBE: {"version": chosen}}})
                deaf += not _answers_with(watching, version) + (not _answers_with(obeying, chosen))
                shutil.rmtree(root / PROBE / str(100 + number - EVERY), ignore_errors=True)
        faults = _faults(watching) + _faults(obeying)
    words = f"{changes:,} changes to a directory and a state file: {faults} stops, {deaf} times nobody followed"
    return Measured(words, not faults and not deaf, {"changes": changes, "stops": faults, "deaf": deaf})


def _answers_with(server: Served, version: str) -> bool:
    """Whether that version of the probe comes to answer."""
    import httpx

    end = time.monotonic() + PATIENCE
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=PATIENCE) as client:
        while time.monotonic() < end:
            reply = client.get(f"/models/{PROBE}")
            if reply.status_code == 200 and reply.json()["version"] == version:
                return True
            time.sleep(WATCH)
    return False


def _faults(server: Served) -> int:
    """Errors that ended background work, as the server counts them."""
    import httpx

    lines = httpx.get(f"{server.url}/metrics", headers=HEADERS, timeout=PATIENCE).text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("bertology_background_faults_total")))


def vandalise(draw: random.Random, root: Path, good: Path) -> str:
    """One change below ``root``, with deltas like those of ``good``; what it was. The probe's own versions stay."""
    kind = draw.choice(tuple(_CHANGES))
    parts = draw.choice(NAMES), *([draw.choice(VERSIONS)] if draw.random() < 0.6 else ())
    source = draw.choice(sorted(path for path in good.iterdir() if path.is_dir())) / "1"
    path = root.joinpath(*parts)
    for holder in (path, path.parent):
        if holder.is_symlink() or (holder.exists() and not holder.is_dir()):
            holder.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    _CHANGES[kind](draw, path, source)
    return f"{kind}: {'/'.join(parts)}"


def scribble(draw: random.Random, state: Path) -> None:
    """One change of the state file."""
    _clear(state)
    wish: dict[str, Any] = {
        "version": draw.choice([*VERSIONS, None, 1, ""]),
        "weight": draw.choice([1, 2.5, 0, -1, 1e300, "x", 10**400]),
        "pin": draw.choice([True, False, None]),
        "canary": draw.choice([None, {"version": "1", "share": 0.5}, {"version": "2", "share": 7}, {"share": []}, "2"]),
        "shadow": draw.choice(["", "1", "9", "../1"]),
    }
    chosen = {name: wish[name] for name in draw.sample(sorted(wish), draw.randint(0, 5))}
    deltas: Any = {name: chosen for name in draw.sample(NAMES, 2)}
    text = json.dumps({"deltas": deltas, "others": draw.choice(["keep", "unload", "burn"])}).encode()
    kind = draw.randrange(8)
    if kind == 0:
        return
    if kind == 1:
        os.mkfifo(state)
    elif kind == 2:
        state.mkdir()
    elif kind == 3:
        state.symlink_to(draw.choice(["/dev/zero", state.name, "gone"]))
    elif kind == 4:
        state.write_bytes(text[: draw.randrange(len(text))])
    elif kind == 5:
        state.write_bytes(draw.choice([b"[" * 100_000, b"\xff\xfe", b"", b'{"deltas":' * 5000, draw.randbytes(50)]))
    else:
        write_state(state, json.loads(text))


def write_state(state: Path, values: Any) -> None:
    """Writes the file as a careful writer does: under another name first."""
    _clear(state)
    beside = state.with_suffix(".tmp")
    beside.write_text(json.dumps(values), encoding="utf-8")
    beside.replace(state)


def _put(draw: random.Random, path: Path, source: Path) -> None:
    _clear(path)
    shutil.copytree(source, path)


def _damaged(draw: random.Random, path: Path, source: Path) -> None:
    _put(draw, path, source)
    draw.choice(_DAMAGES)(path)


def _deep(draw: random.Random, path: Path, source: Path) -> None:
    """Tensors of more dimensions than torch knows."""
    _put(draw, path, source)
    sizes = [draw.choice((0, 1))] * draw.choice((65, 200))
    end = 4 * min(sizes)
    header = json.dumps({"a": {"dtype": "F32", "shape": sizes, "data_offsets": [0, end]}}).encode()
    (path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    if draw.random() < 0.5:
        (path / MANIFEST).unlink()


def _of_peft(draw: random.Random, path: Path, source: Path) -> None:
    _put(draw, path, source)
    (path / MANIFEST).unlink()
    config = path / "adapter_config.json"
    if draw.random() < 0.5:
        config.write_bytes(draw.choice([b"{}", b"[]", b'{"peft_type": "LORA"}', b'{"peft_type": []}', b"\xff"]))


def _renamed(draw: random.Random, path: Path, source: Path) -> None:
    target = path.with_name(draw.choice(NAMES))
    if path.exists() and not os.path.lexists(target):
        path.rename(target)


def _linked(draw: random.Random, path: Path, source: Path) -> None:
    _clear(path)
    path.symlink_to(draw.choice([source, path, path.parent, Path("gone"), Path("/")]))


def _no_file(draw: random.Random, path: Path, source: Path) -> None:
    """A delta whose manifest is a pipe, a directory, a link to nowhere or to something endless."""
    _put(draw, path, source)
    name = path / draw.choice((MANIFEST, WEIGHTS))
    _clear(name)
    kind = draw.randrange(3)
    if kind == 0:
        os.mkfifo(name)
    elif kind == 1:
        name.mkdir()
    else:
        name.symlink_to(draw.choice(["/dev/zero", "gone", "."]))


def _noise(draw: random.Random, path: Path, source: Path) -> None:
    _clear(path)
    path.mkdir()
    (path / draw.choice((MANIFEST, "notes", "adapter_config.json"))).write_bytes(draw.randbytes(draw.randrange(200)))


def _torn_name(draw: random.Random, path: Path, source: Path) -> None:
    """A name that is no UTF-8."""
    _put(draw, path.with_name(os.fsdecode(b"\xff\xfe")), source)


_CHANGES: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "put": _put,
    "damaged": _damaged,
    "deep": _deep,
    "of peft": _of_peft,
    "renamed": _renamed,
    "linked": _linked,
    "no file": _no_file,
    "noise": _noise,
    "torn name": _torn_name,
    "gone": lambda draw, path, source: _clear(path),
}


def _clear(path: Path) -> None:
    """Takes away whatever lies there."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
