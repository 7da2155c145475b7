"""Exported forms of MiniLM beside each other: dense and unpadded, float32 and 8 bits, by how full a batch is.

    python benchmarks/export_forms.py [--rounds 9]

One thread of ONNX Runtime. Processor time of the process, so that other work on the machine counts little; the forms
take turns, and a ratio is the median over rounds. Ids are random; the longest sequence fills the batch.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.export.direct.emit import emit
from bertology_serve.export.onnx_model import save
from bertology_serve.export.parts import parts_of
from bertology_serve.export.session import Session
from bertology_serve.tasks.spec import TaskSpec

SHAPES, FILLS = ((32, 64), (8, 128)), (0.2, 0.4, 1.0)
FORMS = {
    "dense": (False, "fp32"),
    "unpadded": (True, "fp32"),
    "dense int8-row": (False, "int8-row"),
    "unpadded int8-row": (True, "int8-row"),
}


def sessions() -> dict[str, Session]:
    """MiniLM's embeddings in every form."""
    encoder = Encoder.load("minilm")
    delta = Delta("bench", encoder.ref, TaskSpec("embedding", max_length=128, head="none", pooling="mean"))
    parts, made = parts_of(encoder, delta, True), {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (unpad, precision) in FORMS.items():
            path = Path(directory) / "model.onnx"
            save(emit(parts, 20, unpad, precision), path)
            made[name] = Session(path)
    return made


def batch(rows: int, columns: int, fill: float, seed: int = 0) -> dict[str, Any]:
    """Right-padded int64 arrays whose share of real tokens is about ``fill``."""
    generator = np.random.default_rng(seed)
    lengths = np.full(rows, columns)
    if fill < 1:
        drawn = generator.beta(fill * 2, (1 - fill) * 2, rows)
        mean = (fill * rows - 1) / (rows - 1)  # the first is as long as the batch
        lengths = np.clip(np.round(drawn * mean / drawn.mean() * columns), 4, columns).astype(int)
        lengths[0] = columns
    mask = (np.arange(columns) < lengths[:, None]).astype(np.int64)
    ids = generator.integers(1000, 20000, (rows, columns)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def times(forms: dict[str, Session], arrays: dict[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every round but two warm ones, by form."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 2):
        for name, session in forms.items():
            started = time.process_time()
            session.run(arrays)
            taken[name].append(time.process_time() - started)
    return {name: np.array(seconds[2:]) for name, seconds in taken.items()}


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    forms = sessions()
    version = next(iter(forms.values())).version
    print(f"{platform.machine()}, {os.cpu_count()} cores, onnxruntime {version}, {datetime.now(UTC):%Y-%m-%d}\n")
    print(f"| batch | fill | dense, ms | {' | '.join(f'{name}, ×' for name in list(forms)[1:])} |")
    print("|---|---|---|" + "---|" * (len(forms) - 1))
    for rows, columns in SHAPES:
        for fill in FILLS:
            arrays = batch(rows, columns, fill)
            taken = times(forms, arrays, rounds)
            ratios = [float(np.median(taken["dense"] / taken[name])) for name in list(forms)[1:]]
            dense = float(np.median(taken["dense"])) * 1e3
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {rows}×{columns} | {arrays['attention_mask'].mean():.2f} | {dense:.0f} | {shown} |")


if __name__ == "__main__":
    main()
