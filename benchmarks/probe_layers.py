"""A linear probe for every layer, solved for ten values of C, beside one forward pass over the same data.

    BERTOLOGY_DATA=../shared/data python benchmarks/probe_layers.py [--rows 1000] [--rounds 3]

Both begin with tokenised records and an encoder in memory. The pass reads the last layer's rows and nothing else; the
probes' time holds a pass of its own, features on disk, and the choice of C on 500 other records. Rounds alternate;
reported is the median over rounds of the ratio, in wall time and in processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bertology_serve
from bertology_serve.data.records import read_records
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.config import TrainConfig
from bertology_serve.training.features import pooled
from bertology_serve.training.recipes import stages
from bertology_serve.training.rundir import RunDirectory
from bertology_serve.training.solve import Solver
from bertology_serve.training.sources import Source
from bertology_serve.training.train import Prepared, prepare


def main() -> None:
    """Measures, and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data/ag_news"))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probe_layers.json")
    asked = parser.parse_args()
    config = TrainConfig("classification", recipe="lp", lp_layers="all")
    encoder = Encoder.load("minilm")
    encoder.prepack()
    train, dev = (
        Source(name, read_records(asked.folder / f"{name}.jsonl.gz")[:count])
        for name, count in (("train", asked.rows), ("test", 500))
    )
    stage = stages(config)[0].config
    ready = prepare(stage, encoder, train, dev)
    rounds = []
    for number in range(asked.rounds):
        work = [("pass", lambda: one_pass(ready, stage)), ("probes", lambda: probes(ready, stage))]
        times = {name: timed(run) for name, run in (work if number % 2 else reversed(work))}
        rounds.append({f"{name}_{clock}": value for name, own in times.items() for clock, value in own.items()})
        print(rounds[-1], flush=True)
    ratios = {
        clock: statistics.median(one[f"probes_{clock}"] / one[f"pass_{clock}"] for one in rounds)
        for clock in ("wall", "cpu")
    }
    versions = f"bertology-serve {bertology_serve.__version__}, torch {torch.__version__}"
    found = {
        "rows": asked.rows,
        "layers": encoder.anatomy.layers + 1,
        "rounds": rounds,
        **ratios,
        "versions": f"{versions}, {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).date().isoformat(),
    }
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found)


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def one_pass(ready: Prepared, config: TrainConfig) -> None:
    """The training and the evaluation records through the encoder, once."""
    pooled(ready.live, [*ready.items, *ready.dev], (ready.live.encoder.anatomy.layers,), config.max_tokens)


def probes(ready: Prepared, config: TrainConfig) -> None:
    """A probe a layer, ten values of C each, from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "x")
        directory.open({}, {}, False)
        Solver(ready.live, ready.task, ready.items, config, ready.dev, directory).run()


if __name__ == "__main__":
    main()
