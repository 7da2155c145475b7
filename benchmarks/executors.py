"""Two executors beside one: ``serve --executors 2`` and ``--executors 1``, in turns, each with a thread.

``python benchmarks/executors.py`` (about two minutes on two cores). Calls for a CPU second of an executor say what
cores of their own would do: of the mean one, and of the busiest, which on a busy machine is the one that others leave a
core to. Calls a second are those of this machine, whose cores server, client and whatever else runs share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import mean, median

from bertology_serve.bench.prove.cores import ONE_THREAD, cpu_seconds, descendants
from bertology_serve.bench.prove.stage import WORDS, Served, Stage
from bertology_serve.bench.prove.traffic import closed, predict
from bertology_serve.export.installation import environment

DELTAS, CLIENTS = 16, 16  # clients for each executor, so that batches are equally large


def executors(served: Served, count: int) -> list[int]:
    """The processes that run batches: those below the fork server."""
    return [pid for pid in descendants(served.pid) if not descendants(pid)][-count:]


def main() -> None:
    """Measures both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    draw, found = random.Random(0), {name: {1: list[float](), 2: list[float]()} for name in ("mean", "busiest", "wall")}

    def ask() -> bytes:
        return predict(f"d{draw.randrange(DELTAS)}", " ".join(draw.choices(WORDS, k=12)))

    with tempfile.TemporaryDirectory() as folder:
        stage, root = Stage("minilm", Path(folder), quick=True), Path(folder) / "deltas"
        for number in range(DELTAS):
            stage.save(root, f"d{number}", "1", number, "mood")
        # batches as large as what waits: how long one takes on a busy machine does not make them smaller
        common = ("--max-batch-ms", "2000", "--executor", "process", "--engine", "torch", "--executors")
        own = {"BERTOLOGY_CACHE": str(Path(folder) / "cache"), **ONE_THREAD}
        with stage.server(root, *common, "1", environ=own) as one, stage.server(root, *common, "2", environ=own) as two:
            for _ in range(options.rounds):
                for count, served in ((1, one), (2, two)):
                    pids = executors(served, count)
                    before, began = [cpu_seconds(pid) for pid in pids], time.perf_counter()
                    answered = asyncio.run(closed(served.url, ask, count * CLIENTS, options.seconds)).count
                    spent = [cpu_seconds(pid) - then for pid, then in zip(pids, before, strict=True)]
                    passed = time.perf_counter() - began
                    for name, seconds in (("mean", mean(spent)), ("busiest", max(spent)), ("wall", passed)):
                        found[name][count].append(answered / seconds)
    ratios = {name: median(b / a for a, b in zip(one[1], one[2], strict=True)) for name, one in found.items()}
    print(json.dumps(environment() | {"load": os.getloadavg()[0], "calls_for_a_second": found, "two_over_one": ratios}))


if __name__ == "__main__":
    main()
