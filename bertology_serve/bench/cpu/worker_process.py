"""The harness' side of a ``worker.py``: starts one, asks it, and says in one line what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any

from bertology_serve.errors import Unsupported

HERE = Path(__file__).parent
SECONDS = 900
"""Within which a request is answered; exporting and calibrating take minutes."""
QUIET = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NNCF_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip


def cores(threads: int) -> list[int]:
    """The cores that workers are pinned to: the last ones that this process may use."""
    return sorted(os.sched_getaffinity(0))[-threads:] if hasattr(os, "sched_getaffinity") else []


class WorkerProcess:
    """A worker on ``threads`` cores, in the environment of a Python; a context manager that ends it.

    Raises Unsupported where it answers with an error, dies, or takes more than SECONDS.
    """

    def __init__(self, python: str, builders: str, threads: int) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        command: Sequence[str] = [python, str(HERE / "worker.py"), str(HERE / f"{builders}.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env={**os.environ, **QUIET, **count}, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        if cores(threads):
            os.sched_setaffinity(self._process.pid, cores(threads))

    def ask(self, do: str, **fields: object) -> Mapping[str, Any]:
        """The answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = Timer(SECONDS, self._process.kill)
        timer.start()
        try:
            print(json.dumps({"do": do, **fields}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            hung = not timer.is_alive()
            timer.cancel()
        if not line:
            raise Unsupported(f"it took more than {SECONDS} s to {do}" if hung else f"it died at {do}: {self._last()}")
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unsupported(f"{do}: {answer['error']}")
        return answer

    def _last(self) -> str:
        self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1][:200] if lines else 'it said nothing'} (exit code {self._process.returncode})"

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
