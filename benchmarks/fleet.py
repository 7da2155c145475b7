"""Eight deltas of different kinds trained as a fleet, beside the same eight one after the other.

    python benchmarks/fleet.py [--backbone minilm] [--rows FILE.jsonl.gz] [--rounds 7] [--out results/fleet.json]

Each round trains both ways for a few steps from the same start, in turn; what is reported is the median over rounds of
the ratio of times (on a CPU: of processor seconds). Evaluation, publishing and the making of the deltas are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bertology_serve.data.records import Record, read_records
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.training.batches import Source
from bertology_serve.training.fleet.fleet import Fleet, Member
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig

EIGHT: dict[str, dict[str, Any]] = {
    "lora-4": {"method": "lora", "options": {"lora": {"rank": 4}}},
    "lora-16": {"method": "lora", "options": {"lora": {"rank": 16, "targets": ("query", "key", "value", "output")}}},
    "bitfit": {"method": "bitfit"},
    "houlsby": {"method": "adapter", "options": {"adapter": {"width": 32}}},
    "pfeiffer": {"method": "adapter", "options": {"adapter": {"preset": "pfeiffer", "width": 48}}},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "mixed": {"method": "lora,bitfit"},
}


def main() -> None:
    """Measures every batch size and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--rows", type=Path, help="labelled texts; default: random words of like lengths")
    parser.add_argument("--columns", default="text=text_a")
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--tokens", type=int, default=512, help="rows of one pass")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    encoder = Encoder.load(asked.backbone, device=asked.device)
    packed = encoder.prepack()
    source = read(asked.rows, asked.columns)
    found = {"environment": environment(asked.device), "backbone": asked.backbone, "prepacked": packed, "runs": []}
    for size in asked.batches:
        found["runs"].append(measured(encoder, source, size, asked.steps, asked.rounds, asked.tokens))
        print(json.dumps(found["runs"][-1]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(encoder: Encoder, source: Source, size: int, steps: int, rounds: int, tokens: int) -> dict[str, Any]:
    """One batch size: seconds both ways, round by round, and the median of their ratios."""
    alone, together = [], []
    for round_ in range(rounds + 1):  # the first warms up
        for way in ("alone", "together") if round_ % 2 else ("together", "alone"):
            crew = [member(encoder, source, name, size, steps, round_) for name in EIGHT]
            seconds = run([crew] if way == "together" else [[one] for one in crew], tokens, encoder.device)
            (together if way == "together" else alone).append(seconds)
    ratios = [b / a for a, b in zip(alone[1:], together[1:], strict=True)]
    return {
        "batch_size": size,
        "steps": steps,
        "deltas": len(EIGHT),
        "rows_a_pass": tokens,
        "alone_s": round(statistics.median(alone[1:]), 3),
        "fleet_s": round(statistics.median(together[1:]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def member(encoder: Encoder, source: Source, name: str, size: int, steps: int, seed: int) -> Member:
    """A fresh member."""
    config = TrainConfig.of(
        "classification", batch_size=size, max_steps=steps, seed=seed, start="random", **EIGHT[name]
    )
    made = prepare(config, encoder, source)
    return Member(name, made.live, made.task, made.items, config)


def run(fleets: Sequence[Sequence[Member]], tokens: int, device: torch.device) -> float:
    """Seconds that the fleets take one after the other."""
    start = clock()
    for crew in fleets:
        Fleet(crew, tokens).run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def clock() -> float:
    """Seconds; on a CPU those that this process used of it, so that neighbours do not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def read(path: Path | None, columns: str) -> Source:
    """512 rows of a file, or of random words (4 to 40 of them)."""
    if path is not None:
        pairs = dict(pair.split("=") for pair in columns.split(","))
        return Source(path.name, read_records(path, pairs)[:512])
    generator = torch.Generator().manual_seed(0)
    words = "the a good bad film was is not river bank house dog cat red blue cold warm early late".split()
    rows = []
    for row in range(512):
        length = int(torch.randint(4, 40, (1,), generator=generator))
        chosen = torch.randint(len(words), (length,), generator=generator).tolist()
        rows.append(Record({"text": " ".join(words[i] for i in chosen), "label": "ab"[row % 2]}, f"row {row}"))
    return Source("random words", rows)


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
