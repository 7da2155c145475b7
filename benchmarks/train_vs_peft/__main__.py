"""Training with bertology-serve beside peft and transformers' Trainer: the same rows, steps, rates and seeds.

    BERTOLOGY_DATA=../shared/data PYTHONPATH=. python -m benchmarks.train_vs_peft [--sets sst2,mrpc] [--seeds 3]
    ... --rows 128 --epochs 1 --dev-rows 64 --out results/train_speed.json     # the speeds alone

Both train MiniLM, or ``--backbone``, with HuggingFace's head, one learning rate, AdamW, linear decay after a warm-up of
6 %, no dropout of LoRA, and measure the last state; ``--mean`` runs ours a second time where texts are classified, with
the head of a sentence encoder (``--pooling mean --head linear``). Tokens are those of the records, padding not counted;
processor seconds are those of the steps. Runs alternate, seed by seed, ours first on even seeds. Each is made once and
kept in ``--out``. A question's windows have 384 tokens; where it has several, ours are one example of a step, Trainer's
one each. Sequences and targets are the same on both sides (each tokenises by itself), and so is what logits become.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import bertology_serve
from benchmarks.train_vs_peft.ours import ours
from benchmarks.train_vs_peft.report import FIRST, tables
from benchmarks.train_vs_peft.theirs import theirs
from benchmarks.train_vs_peft.works import BATCH, SETS, Work, works
from bertology_serve.tasks.spec import CLASSIFICATION

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Makes what is missing, and writes the table."""
    asked = _asked()
    found: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    for work in _works(asked):
        for side in _sides(work, asked.mean):
            encoder = Path(asked.backbone).name
            key = f"{'' if encoder == FIRST else f'{encoder}/'}{work.method}/{work.name}/{work.seed}/{side}"
            if key in found:
                continue
            found[key] = {**_run(work, asked.backbone, side), "facts": _facts(asked)}
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
            print(key, found[key]["metrics"], f"{found[key]['seconds']:.0f} s", flush=True)
    asked.out.with_suffix(".md").write_text(tables(found))
    print(tables(found))


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default=FIRST)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--methods", default="lora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dev-rows", type=int, help="at most so many measured rows, drawn once")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--mean", action="store_true", help="ours once more, its head on the mean of the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_vs_peft.json")
    return parser.parse_args()


def _works(asked: argparse.Namespace) -> Iterator[Work]:
    """Method by method, seed by seed: what is done first makes whole columns."""
    for method in asked.methods.split(","):
        cells = [
            works(name, method, asked.seeds, asked.rows, asked.dev_rows, asked.epochs) for name in asked.sets.split(",")
        ]
        for seed in zip(*cells, strict=True):
            yield from seed


def _sides(work: Work, mean: bool) -> list[str]:
    both = ["ours", "peft"] if work.seed % 2 == 0 else ["peft", "ours"]
    return [*both, "mean"] if mean and work.known.task == CLASSIFICATION else both


def _run(work: Work, backbone: str, side: str) -> dict[str, Any]:
    if side == "ours":
        return ours(work, backbone)
    if side == "mean":
        return ours(work, backbone, pooling="mean", head="linear")
    with tempfile.TemporaryDirectory() as folder:
        return theirs(work, backbone, Path(folder))


def _facts(asked: argparse.Namespace) -> str:
    budget = f"{asked.rows:,} rows, {asked.epochs} epochs, batches of {BATCH}, {asked.dev_rows or 'all'} rows measured"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    machine = f"CPU, {torch.get_num_threads()} threads; bertology-serve {bertology_serve.__version__}, {versions}"
    return f"{budget}; {machine}; {datetime.now(UTC).date().isoformat()}{os.environ.get('BENCH_NOTE', '')}"


if __name__ == "__main__":
    main()
