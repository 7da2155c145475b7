"""Where figures are measured: an encoder, deltas of all kinds on disk, and servers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bertology_serve.bench.prove.cores import cpu_seconds
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.errors import VerificationError
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.kinds import Spec
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.serving.keys import ADMIN_KEYS
from bertology_serve.tasks.spec import TaskSpec

ADMIN = "the-admin-key-of-the-proof"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}
PATIENCE = 180.0
LENGTH = 48
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
ZOO: dict[str, tuple[Spec, TaskSpec]] = {
    "mood": (Lora(rank=8), TaskSpec("classification", ("bad", "good", "so-so"), LENGTH)),
    "topic": (Lora(rank=4), TaskSpec("classification", tuple(f"t{n}" for n in range(11)), LENGTH)),
    "grade": (Bitfit(), TaskSpec("regression", max_length=LENGTH)),
    "names": (Adapter(width=8), TaskSpec("token-classification", TAGS, LENGTH)),
    "tone": (Prompt(4), TaskSpec("classification", ("rude", "kind"), LENGTH)),
    "sense": (Prefix(4), TaskSpec("embedding", head="none", pooling="mean", max_length=LENGTH)),
}
WORDS = tuple(
    "the of and in to a is for on with that by from at it river bank money cold house film good bad great very".split()
)


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self.process.pid

    @property
    def cpu(self) -> float:
        """CPU seconds that it and what it has started have used so far."""
        return cpu_seconds(self.pid)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)


@dataclass
class Stage:
    """``quick`` measures less of everything, ``pace`` times that. Deltas are written below ``directory``.

    ``served_cpu`` are the CPU seconds of servers that have ended.
    """

    backbone: str
    directory: Path
    quick: bool
    pace: float = 1.0
    served_cpu: float = 0.0
    _encoder: list[Encoder] = field(default_factory=list)

    def count(self, quick: int, full: int) -> int:
        """How many of something."""
        return max(1, round(self.pace * (quick if self.quick else full)))

    def seconds(self, quick: float, full: float) -> float:
        """How long."""
        return self.pace * (quick if self.quick else full)

    @property
    def rounds(self) -> int:
        """How often something is timed, for a median."""
        return 1 if self.quick else 5

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded once."""
        if not self._encoder:
            self._encoder.append(Encoder.load(self.backbone))
            self._encoder[0].prepack()
        return self._encoder[0]

    @property
    def zoo(self) -> Path:
        """One delta of each kind, random, each NAME/1."""
        root = self.directory / "zoo"
        if not root.exists():
            for seed, name in enumerate(ZOO):
                self.save(root, name, "1", seed)
        return root

    def save(self, root: Path, name: str, version: str, seed: int, like: str | None = None) -> None:
        """Writes one random delta like one of the zoo."""
        spec, task = ZOO[like or name]
        delta = self.random(name, spec, task, seed, version)
        delta.save(root / name / version, self.encoder)

    def random(self, name: str, spec: Spec, task: TaskSpec, seed: int, version: str = "1") -> Delta:
        """A delta all of whose tensors are random, so that it changes something."""
        import torch

        live = TrainableDelta(self.encoder, [spec], task, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        return live.freeze(name, version=version)

    @contextlib.contextmanager
    def server(self, deltas: Path, *options: str, environ: Mapping[str, str] | None = None) -> Iterator[Served]:
        """``bertology-serve serve`` with an admin key, once it answers. VerificationError where it does not."""
        command = [sys.executable, "-m", "bertology_serve", "serve", "--backbone", self.backbone, "--port", "0",
                   "--deltas", str(deltas), "--log-level", "error", *options]  # fmt: skip
        with serving(command, {ADMIN_KEYS: ADMIN, **(environ or {})}) as served:
            try:
                yield served
            finally:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    self.served_cpu += served.cpu


@contextlib.contextmanager
def serving(command: list[str], environ: Mapping[str, str]) -> Iterator[Served]:
    """A process that says its address on stderr, as ``serve`` does; it is ended at the end."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ})
    lines: list[str] = []
    found = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if re.search(r"ready.* http://", line):
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        found.wait(PATIENCE)
        address = re.search(r"http://[\w.:\[\]]+", " ".join(lines))
        if process.poll() is not None or address is None:
            raise VerificationError(f"the server did not start: {' '.join(lines[-3:]).strip()[-300:]}")
        yield Served(process, address[0].rstrip(":"))
    finally:
        stop(process)
        reader.join(10)
        if process.stderr is not None:
            process.stderr.close()


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a process, kindly at first."""
    if process.poll() is None:
        process.terminate()
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait(10)
