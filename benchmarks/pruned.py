"""An encoder before and after pruning: serving pipeline and ONNX Runtime, the two taking turns.

    python benchmarks/pruned.py --delta deltas/sst2 --pruned small --input dev.jsonl [--rounds 7] [--most 256]

``--pruned`` is what ``analyze prune --save`` wrote for the delta. One thread. Processor time of the process, so that
other work on the machine counts little; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bertology_serve.data.records import read_records
from bertology_serve.deltas import store
from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Job, Pipeline, Request
from bertology_serve.export.export_spec import ExportSpec
from bertology_serve.export.exporting import export_delta
from bertology_serve.export.session import Session

BATCH = 32


def jobs_of(pipeline: Pipeline, delta: Delta, path: str, most: int) -> list[Job]:
    """The file's first records, tokenised, shortest first."""
    records = read_records(path)[:most]
    jobs = [pipeline.prepare(Request(delta.name, record.fields, where=record.where)) for record in records]
    return sorted(jobs, key=lambda job: job.cost)


def batches(jobs: list[Job]) -> list[list[Job]]:
    """``BATCH`` records each."""
    return [jobs[at : at + BATCH] for at in range(0, len(jobs), BATCH)]


def arrays_of(jobs: list[Job]) -> dict[str, np.ndarray]:
    """A padded batch for ONNX Runtime."""
    rows = [job.encodings[0] for job in jobs]
    width = max(map(len, rows))
    made = {name: np.zeros((len(rows), width), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for i, row in enumerate(rows):
        made["input_ids"][i, : len(row)], made["attention_mask"][i, : len(row)] = row.ids, 1
        made["token_type_ids"][i, : len(row)] = row.types
    return made


def turns(work: dict[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of processor time of every round but one warm one."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            started = time.process_time()
            run()
            taken[name].append(time.process_time() - started)
    return {name: np.array(seconds[1:]) for name, seconds in taken.items()}


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--delta", "--pruned", "--input"):
        parser.add_argument(name, required=True)
    parser.add_argument("--backbone", help="where the encoder before pruning lies; default: as the delta names it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=int, default=256)
    given = parser.parse_args()
    torch.set_num_threads(1)
    delta, work, sizes = store.load(Path(given.delta)), dict[str, Callable[[], None]](), dict[str, tuple[int, float]]()
    with tempfile.TemporaryDirectory() as folder:
        for side, name in (("before", given.backbone or delta.base.name), ("after", given.pruned)):
            encoder = Encoder.load(name)
            done = export_delta(encoder, delta, Path(folder) / side, ExportSpec(merge=True))
            encoder.prepack()
            pipeline = Pipeline(encoder)
            pipeline.add(delta)
            parts = batches(jobs_of(pipeline, delta, given.input, given.most))
            session, arrays = Session(done.directory / "onnx" / "model.onnx"), [arrays_of(part) for part in parts]
            work[f"pipeline {side}"] = lambda p=pipeline, own=parts: [p.run(part) for part in own] and None
            work[f"onnxruntime {side}"] = lambda s=session, own=arrays: [s.run(one) for one in own] and None
            sizes[side] = sum(p.numel() for p in encoder.model.parameters()), done.bytes / 1e6
        seconds = turns(work, given.rounds)
    print(f"| {given.pruned} | before | after | |\n|---|---|---|---|")
    print(f"| parameters | {sizes['before'][0]:,} | {sizes['after'][0]:,} | |")
    print(f"| ONNX file, MB | {sizes['before'][1]:.1f} | {sizes['after'][1]:.1f} | |")
    for engine in ("pipeline", "onnxruntime"):
        before, after = seconds[f"{engine} before"], seconds[f"{engine} after"]
        rates = f"{np.median(before):.2f} | {np.median(after):.2f}"
        print(f"| {engine}, s of CPU | {rates} | × {np.median(before / after):.2f} |")


if __name__ == "__main__":
    main()
