"""One contender in a process of its own: a request is a JSON object in a line of stdin, its answer one of stdout.

``python worker.py BUILDERS`` runs in the contender's environment: it needs numpy alone and imports nothing of this
package. BUILDERS is a file of functions. A builder maps options to ``bind``, and ``bind`` a batch to the call that is
timed, so what is done once, such as laying out inputs, lies outside. A maker writes a file that a builder opens.

| ``do`` | fields | answer |
|---|---|---|
| ``make`` | ``maker``, ``options`` | ``seconds`` |
| ``open`` | ``builder``, ``options`` | ``seconds``, ``rss``, ``versions`` |
| ``time`` | ``workload``, ``repeats`` | ``cpu`` and ``wall`` seconds of the workload, ``rss`` |
| ``answer`` | ``workload``, ``to`` | ``rows``; float32 [S, C] lie in ``to`` |

An answer with ``error`` says what failed. A workload is a path without its suffix: ``.npz`` has the batches' arrays
``NUMBER.NAME``, ``.json`` their texts and the owners of their rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, Any]
"""``input_ids``, ``attention_mask``, ``token_type_ids``: int64 [B, L]; ``texts`` and ``owners``: B strings each."""
Call = Callable[[], "np.ndarray[Any, Any]"]
Bind = Callable[[Batch], Call]
TOLD = (
    "adapters", "bertology-serve", "ctranslate2", "fastembed", "llama-cpp-python", "nncf", "numpy", "olive-ai",
    "onnxruntime", "openvino", "optimum", "optimum-intel", "optimum-onnx", "peft", "sentence-transformers", "torch",
    "transformers",
)  # fmt: skip


def read(workload: str) -> list[Batch]:
    """The batches of a workload."""
    told = json.loads(Path(workload + ".json").read_text(encoding="utf-8"))
    with np.load(workload + ".npz") as arrays:
        found = [
            {"texts": texts, "owners": owners} for texts, owners in zip(told["texts"], told["owners"], strict=True)
        ]
        for name in arrays.files:
            number, _, array = name.partition(".")
            found[int(number)][array] = arrays[name]
    return found


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """What is installed here of all that could matter."""
    found = {"python": sys.version.split()[0]}
    for name in TOLD:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Worker:
    """Answers requests; ``known`` are the functions of BUILDERS."""

    def __init__(self, known: Mapping[str, Callable[..., Any]]) -> None:
        self.known = known
        self._bind: Bind | None = None
        self._bound: tuple[str, list[Call]] = ("", [])

    def make(self, maker: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes what a contender opens."""
        started = time.perf_counter()
        self.known[maker](**options)
        return {"seconds": time.perf_counter() - started}

    def open(self, builder: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Loads the contender."""
        started = time.perf_counter()
        self._bind = self.known[builder](**options)
        return {"seconds": time.perf_counter() - started, "rss": resident(), "versions": versions()}

    def time(self, workload: str, repeats: int) -> Mapping[str, Any]:
        """Runs a workload some times; the seconds are those of one."""
        calls = self._calls(workload)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            for call in calls:
                call()
        taken = (time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats
        return {"cpu": taken[0], "wall": taken[1], "rss": resident()}

    def answer(self, workload: str, to: str) -> Mapping[str, Any]:
        """Runs a workload once and keeps its rows."""
        rows = np.concatenate([np.asarray(call(), dtype=np.float32) for call in self._calls(workload)])
        np.save(to, rows)
        return {"rows": len(rows)}

    def _calls(self, workload: str) -> list[Call]:
        if self._bound[0] != workload:
            if self._bind is None:
                raise RuntimeError("no contender was opened")
            self._bound = ("", [])  # the last one's inputs go first
            self._bound = (workload, [self._bind(batch) for batch in read(workload)])
        return self._bound[1]


def main() -> None:
    """Answers until stdin ends. What a tool prints goes to stderr."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(runpy.run_path(sys.argv[1]))
            answer = getattr(worker, request.pop("do"))(**request)
        except BaseException as problem:  # whatever a tool raises is its answer
            answer = {"error": f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]}
        print(json.dumps(answer), file=said, flush=True)


if __name__ == "__main__":
    main()
